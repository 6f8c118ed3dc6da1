"""The docs: links resolve, named files exist, and every `revpatch ...` is a command with options that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

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
def test_links_resolve(path: Path) -> None:
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: ({link}) leads nowhere"
        assert not anchor or anchor in anchors(target), f"{path.name}: ({link}): no such heading in {target.name}"


@every_doc
def test_named_files_exist(path: Path) -> None:
    for name in PLACE.findall(path.read_text(encoding="utf-8")):
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
def test_every_command_in_the_docs_is_one(path: Path) -> None:
    wrong = {" ".join(call): mistake_of(call) for call in calls(path.read_text(encoding="utf-8"))}
    assert not {call: why for call, why in wrong.items() if why}


@every_doc
def test_every_key_that_the_docs_set_is_one(path: Path) -> None:
    """Those for the demo's config, whose phases and sets are the names; a stand-in such as FOLDER is a value too."""
    text = path.read_text(encoding="utf-8")
    for option in re.findall(r"--set ([\w.]+=[^\s`'\")]+)", text):
        if "=..." not in option and option != "a=b":
            load_config(ROOT / "configs/demo.yaml", [option])


@pytest.mark.parametrize("path", HEADS, ids=lambda path: path.name)
def test_every_launcher_says_in_its_head_how_it_is_used(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines()[:2] if not line.startswith("#!")]
    uses = [line.split("Use", 1)[1] for line in head if "  Use" in line]
    assert len(uses) == 1
    assert path.name in uses[0]


def test_calls_are_found() -> None:
    text = (
        "Say `revpatch ledger log RUN` or:\n\n    HF_HUB_OFFLINE=1 revpatch train C --set a=b   # begins\n"
        "    torchrun -m revpatch train C --fresh\n    revpatch shards build SOURCE... --out F\n"
        "                                    [--workers N]\n\n```\npython -m revpatch doctor --json\n```\n"
    )
    assert [" ".join(call) for call in calls(text)] == [
        *("train C --set a=b", "train C --fresh", "shards build SOURCE... --out F --workers N", "doctor --json"),
        "ledger log RUN",
    ]


@pytest.mark.parametrize(
    "call", ["trian C", "train C --frsh", "train A B", "ledger lgo RUN", "train C --set", "shards build A --oot F"]
)
def test_a_wrong_command_is_seen(call: str) -> None:
    assert mistake_of(call.split()) is not None
    assert mistake_of(["train", "C", "--set", "a=b"]) is None
