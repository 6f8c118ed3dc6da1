"""Patches by name: a file, a run, `RUN@REF`; what isn't there is told with what is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from revpatch.ledger.ledger import Ledger, read_patch
from revpatch.ledger.patch_file import EntryError

KINDS = [("start", 0), ("good", 10), ("good", 20), ("rollback", 30), ("good", 40), ("commit", 50)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "a run@home"
    ledger = Ledger(run / "ledger")
    for number, (kind, step) in enumerate(KINDS):
        ledger.record(kind, 0, "wiki", step, {"w": torch.full((2,), float(number))}, {"step": step})
    return run


@pytest.mark.parametrize(
    ("reference", "number"),
    [
        ("", 5),
        ("@commit", 5),
        ("@head", 5),
        ("@head~1", 4),
        ("@start", 0),
        ("@good", 4),
        ("@good~2", 1),
        ("@rollback", 3),
        ("@000_wiki_commit", 5),
        ("@000_wiki_good_step000000010.safetensors", 1),
    ],
)
def test_an_entry_is_found_by_name_or_by_counting_back(run: Path, reference: str, number: int) -> None:
    tensors, metadata = (patch := read_patch(f"{run}{reference}")).tensors, patch.metadata
    assert tensors["w"].tolist() == [number] * 2
    assert metadata["step"] == KINDS[number][1]


def test_a_file_is_held_against_the_journal_beside_it(run: Path, tmp_path: Path) -> None:
    file = run / "ledger/000_wiki_commit.safetensors"
    assert read_patch(file).tensors["w"].tolist() == [5, 5]
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(file.read_bytes())
    assert read_patch(alone).event is None and read_patch(alone).tensors["w"].tolist() == [5, 5]
    file.write_bytes((run / "ledger/000_wiki_start.safetensors").read_bytes())
    with pytest.raises(EntryError, match="not the file that was recorded"):
        read_patch(file)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("@good~3", EntryError, "has 3 good entries"),
        ("@nothing", EntryError, "000_wiki_start.safetensors"),
        ("@../../etc/passwd", EntryError, "without '/' and '..'"),
        ("@/etc/passwd", EntryError, "without '/' and '..'"),
        ("@good~", EntryError, "is not in"),
        ("/ledger/none.safetensors", FileNotFoundError, "no such file or folder"),
    ],
)
def test_what_is_not_there_is_told(run: Path, reference: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_patch(f"{run}{reference}")


def test_a_run_without_a_commit_is_told_how_to_name_another_entry(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger").record("start", 0, "wiki", 0, {"w": torch.zeros(1)}, {})
    with pytest.raises(EntryError, match=r"no commit yet.*@head.*000_wiki_start"):
        read_patch(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="a folder without ledger"):
        read_patch(tmp_path / "empty")
