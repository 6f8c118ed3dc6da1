"""The docs: links resolve, named files exist, every `revpatch ...` is a command with options that there are, and what
README.md shows to be typed is typed here and ends well."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from command import Call
from toy import CORPORA, Toy, make_text

from revpatch import is_patched
from revpatch.cli import app
from revpatch.config.file import load_config

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("[!.]*/README.md"))]
HEADS = [path for pattern in ("*.sh", "*.sbatch", "*.yaml") for path in sorted((ROOT / "launch").glob(pattern))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACE = re.compile(r"(?<![\w/.~-])(?:configs|docker|docs|launch|revpatch|tests|tools)/[\w./-]*\w")
CALL = re.compile(r"(?:^|[\s(])(?:python -m |-m |--module )?revpatch (?=[a-z-])")
JUST_A_NAME = re.compile(r"^[A-Z][A-Z_]*(\.{3})?$")
COMMAND: Any = typer.main.get_command(app)

every_doc = pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every_doc
def test_links_resolve_and_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: ({link}) leads nowhere"
        assert not anchor or anchor in anchors(target), f"{path.name}: ({link}): no such heading in {target.name}"
    for name in PLACE.findall(text):
        assert (ROOT / name).exists() or (path.parent / name).exists(), f"{path.name}: there is no {name}"


def typed_lines(text: str) -> list[str]:
    """The lines of indented and fenced blocks, those that go on in the next one joined, and code in running text."""
    lines, running, fenced = [""], "", False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            running += f"{line} "
            lines.append("")
        elif lines[-1] and (lines[-1].endswith("\\") or line.startswith(" " * 12)):
            lines[-1] = lines[-1].removesuffix("\\") + f" {line.strip()}"
        else:
            lines.append(line.strip())
    return [*filter(None, lines), *re.findall(r"`([^`]+)`", running)]


def calls(text: str) -> list[list[str]]:
    """What is typed after `revpatch`, for every call in a document."""
    found = []
    for line in typed_lines(text):
        for match in CALL.finditer(line):
            rest = re.split(r"\s#|[;&]|\|\s|\$\(|\)$", line[match.end() :])[0]
            found.append(shlex.split(rest.replace("[", " ").replace("]", " "), comments=False))
    return found


def mistake_of(arguments: list[str]) -> str | None:
    """Why the command line would not take these words; None if it would. Values are not looked at."""
    command, words = COMMAND, list(arguments)
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            # `revpatch shards` in running text means the whole group.
            return None if not words or JUST_A_NAME.match(words[0]) or words == ["..."] else f"no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    context = command.context_class(command)
    try:
        _, left, _ = command.make_parser(context).parse_args([word for word in words if word not in ("...", "|")])
    except Exception as error:
        return str(error) or type(error).__name__
    return f"too many words: {left}" if left else None


@every_doc
def test_every_command_and_every_key_that_it_sets_is_one(path: Path) -> None:
    """Keys are those for the demo's config, whose phases and sets are the names; FOLDER and its like are values."""
    text = path.read_text(encoding="utf-8")
    wrong = {" ".join(call): mistake_of(call) for call in calls(text)}
    assert not {call: why for call, why in wrong.items() if why}
    for option in re.findall(r"--set ([\w.]+=[^\s`'\")]+)", text):
        if "=..." not in option and option != "a=b":
            load_config(ROOT / "configs/demo.yaml", [option])
    if path == DOCS[0]:
        assert len(wrong) >= 10, "calls are found"
        assert mistake_of(["train", "C", "--frsh"]) and mistake_of(["ledger", "lgo", "RUN"]) and mistake_of(["trian"])


@pytest.mark.parametrize("path", HEADS, ids=lambda path: path.name)
def test_every_launcher_says_in_its_head_how_it_is_used(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines()[:2] if not line.startswith("#!")]
    uses = [line.split("Use", 1)[1] for line in head if "  Use" in line]
    assert len(uses) == 1
    assert path.name in uses[0]


SHORT = "--set base.model=base_model --set base.dtype=float32 --set base.block_size=16 --set sidecar.bottleneck=8"
SHORT += " --set phases.0.steps=4 --set optimizer.warmup_steps=1 --set probes.every=2 --set batch.new_blocks=4"
SHORT += " --set batch.replay_blocks=4 --set batch.micro_blocks=4 --set monitoring.samples.max_new_tokens=2"
SHORT += " --set probes.sets.0.tolerance=1 --set rollback.max_drift=2 --set replay.own_blocks=32"
TYPED = {
    "shards build": ["data/mine: "],
    "train": ["commit 000_mine_commit.safetensors"],
    "generate": ["learned"],
    "report": ["plasticity"],
    "ledger log": ["000_mine_commit.safetensors"],
    "ledger verify": ["journal", "can be removed"],
}
"""Commands of README.md's example, and words of what each call of them prints."""


def test_the_readmes_example_ends_well(
    toy: Toy, tmp_path: Path, revpatch: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands, its lines of Python and its tree of files, on the toy's base for GPT-2 and for few steps."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = readme[readme.index("## Your own text with GPT-2") : readme.index("A run can be stopped")]
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "base_model").symlink_to(toy.base)
    lines = [json.dumps({"text": make_text(i, CORPORA["first"])}) for i in range(150)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    more = {"train": SHORT.split(), "generate": ["--max-new-tokens", "2"]}
    instead = {"gpt2": "base_model", "1024": "16"}
    expected = {name: list(words) for name, words in TYPED.items()}
    for call in calls("\n".join(line for line in example.splitlines() if line.startswith("    "))):
        (name,) = (each for each in TYPED if " ".join(call).startswith(each))
        done = revpatch(*(instead.get(word, word) for word in call), *more.get(name, []))
        assert done.code == 0 and expected[name].pop(0) in done.out, done
    assert not any(expected.values()), "a command that README.md no longer shows"
    names: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(compile(code, "README.md", "exec"), names)
    assert not is_patched(names["model"])
    tree = re.findall(r"^      ([\w./]+) ", readme[readme.index("    runs/NAME/") :], re.MULTILINE)
    assert len(tree) == 7 and not [each for each in tree if not (tmp_path / "runs/gpt2_own_text" / each).exists()]
