"""What README.md and docs/ show to be typed is typed here, in the order of each document, and ends well.

A toy base and a few steps stand for what takes hours. The tables of typed_tables.py have every substitution, and every
block that is not typed here with the reason; a block that is in no table fails.
"""

from __future__ import annotations

import ast
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import Runs, RunServer
from toy import CORPORA, Toy, make_text
from typed import ROOT, Block, Typist, blocks_of
from typed_tables import ELSEWHERE, INSTEAD, LEFT_OUT, REFUSALS, SHOWN, TYPED

import revpatch
from revpatch.config.file import load_config
from revpatch.ledger.maintenance import verify
from revpatch.patch.families import Family

DOCUMENTS = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


def runs_python(block: Block, folder: Path) -> None:
    """From top to bottom; every name that it gives is a thing of its."""
    names: dict[str, Any] = {}
    exec(compile(block.text, block.name, "exec"), names)
    assert not revpatch.is_patched(names["model"]) or "attach" in block.text


def is_of_a_config(block: Block, folder: Path) -> None:
    """Two corpora at three to one, in a config whose probes know nothing of them."""
    config = yaml.safe_load((folder / "configs/gpt2_own_text.yaml").read_text())
    config |= yaml.safe_load(block.text)
    config["probes"]["sets"] = []
    file = folder / "mixed.yaml"
    file.write_text(yaml.safe_dump(config))
    (phase,) = load_config(file).phases
    assert [(part.shards, part.weight) for part in phase.shards] == [("data/mine", 3), ("data/general", 1)]


def is_a_family(block: Block, folder: Path) -> None:
    """A row of the table."""
    row = ast.parse(f"{{{block.text}\n}}", mode="eval")
    (family,) = eval(compile(row, block.name, "eval"), {"Family": Family}).values()
    assert family.head == "lm_head"


OTHERWISE = {
    "docs/CORPORA.md: phases:": is_of_a_config,
    "README.md: import revpatch": runs_python,
    "docs/PATCHES.md: import revpatch": runs_python,
    'docs/PATCHES.md: "mistral": Family(body="model", blocks="model.layers"),': is_a_family,
}
"""Blocks that are no commands, and what is done with them."""


def test_every_block_is_in_a_table_and_every_row_has_its_block() -> None:
    blocks = [name for document in DOCUMENTS for name in blocks_of(document)]
    tables = [*TYPED, *ELSEWHERE, *SHOWN, *OTHERWISE]
    assert sorted(tables) == sorted(blocks)


@pytest.mark.parametrize("test", [*(test for _, test in ELSEWHERE.values()), *LEFT_OUT.values()])
def test_what_runs_the_like_of_a_block_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    assert name in functions_in(file)


@pytest.fixture(scope="module")
def trained(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one phase, for the documents whose commands begin with one."""
    folder = tmp_path_factory.mktemp("trained")
    phase = {"name": "wiki", "shards": str(toy.shards("first")), "steps": 8}
    probe = {"name": "general", "shards": str(toy.shards("base_probe")), "max_blocks": 8, "tolerance": 5.0}
    settings: dict[str, Any] = {
        "phases": [phase],
        "probes": {"every": 2, "sets": [probe]},
        "rollback": {"max_drift": 9.0},
    }
    runs = Runs(server, toy.config_file(folder, **settings), folder)
    assert runs.run("run", world=1) == [0], runs.log("run").read_text()
    return folder


@pytest.fixture
def folder(toy: Toy, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is typed, as a reader has it: the checkout's configs, texts of the reader's own, runs, a base."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "base_model").symlink_to(toy.base)
    for name, corpus in (("mine", "first"), ("general", "base")):
        lines = [json.dumps({"text": make_text(i, CORPORA[corpus])}) for i in range(150)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "prompts.txt").write_text("the patch\na stream\n")
    shutil.copy(trained / "config.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


HAD = {
    "docs/LEDGER.md": ["a"],
    "docs/PATCHES.md": ["demo", "other"],
    "docs/RUNS.md": ["a"],
    "docs/SURGERY.md": ["mine", "a", "b"],
}
"""The runs that a document takes for granted."""


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if any(n.startswith(each) for n in TYPED)])
def test_what_is_typed_ends_well(document: str, server: RunServer, folder: Path, trained: Path, toy: Toy) -> None:
    for run in HAD.get(document, []):
        shutil.copytree(trained / "run", folder / "runs" / run)
    if document == "docs/SURGERY.md":
        (folder / "data").mkdir()
        (folder / "data/general_probe").symlink_to(toy.shards("base_probe"))
        (folder / "data/mine_probe").symlink_to(toy.shards("first_probe"))
    typist = Typist(server, folder, INSTEAD.get(document, {}))
    for name, block in blocks_of(document).items():
        if name in OTHERWISE:
            OTHERWISE[name](Block(name, typist.put(block.text)), folder)
        elif name in TYPED:
            said = typist.types(block, *LEFT_OUT)
            for words, (code, text) in zip(TYPED[name], said, strict=True):
                assert (code, words in text) == (2 if words in REFUSALS else 0, True), text
    assert typist.met == typist.instead.keys(), "what is put in the place of nothing"
    for run in (folder / "runs").glob("*"):
        assert verify(run).ok, run
    if document == "README.md":
        typist.types(
            Block("", "revpatch report runs/gpt2_own_text --html")
        )  # the run was begun anew since the first one
        the_outputs_are_where_it_says(blocks_of(document)["README.md: runs/NAME/"], folder / "runs/gpt2_own_text")


def the_outputs_are_where_it_says(tree: Block, run: Path) -> None:
    """The tree of README.md, of a run whose report was written; a file named in passing is one of the ledger."""
    named = [line.split()[0] for line in tree.text.splitlines()[1:] if line.startswith("  ") and line[2] != " "]
    assert named
    assert not [name for name in named if not (run / name).exists()]


def test_the_tests_that_contributing_names_are_there() -> None:
    lines = blocks_of("docs/CONTRIBUTING.md")["docs/CONTRIBUTING.md: bash tests/run.sh"].text.splitlines()
    calls = [shlex.split(line, comments=True) for line in lines if line.startswith("python -m pytest")]
    chosen = [(call[3], call[call.index("-k") + 1] if "-k" in call else "test") for call in calls]
    assert len(chosen) == 3
    assert not [(file, word) for file, word in chosen if not any(word in name for name in functions_in(file))]


def functions_in(file: str) -> set[str]:
    """Those at the top of a file of tests; a row that names a file that isn't there fails by its name."""
    path = ROOT / file
    assert path.is_file(), f"a row names {file}, which is not there: name the file that holds the test now"
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_a_row_that_names_a_file_that_is_gone_says_so() -> None:
    with pytest.raises(AssertionError, match=r"a row names tests/gone\.py, which is not there"):
        functions_in("tests/gone.py")
