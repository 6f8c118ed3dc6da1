"""A restored run begins with the very patch of the old one, says where it is from, and overwrites nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from past_run import a_trained_run, metadata, tensors

from revpatch.ledger.ledger import Ledger, read_patch
from revpatch.ledger.log import log_rows
from revpatch.ledger.maintenance import events_of, origin_of, restore_run, verify
from revpatch.ledger.patch_file import EntryError, write_entry


@pytest.fixture
def run(tmp_path: Path) -> Path:
    a_trained_run(tmp_path / "run")
    return tmp_path / "run"


def test_the_new_run_begins_with_the_patch(run: Path, tmp_path: Path) -> None:
    new = tmp_path / "deep/new"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    restored = restore_run(f"{run}@good~1", new)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before, "the old run is as it was"
    assert sorted(path.name for path in (new / "ledger").iterdir()) == ["000_wiki_origin.safetensors", "journal.jsonl"]
    source = read_patch(f"{run}@good~1")
    assert source.event is not None and source.ledger is not None
    found, told = (patch := read_patch(f"{new}@origin")).tensors, patch.metadata
    assert found.keys() == source.tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in source.tensors.items())
    assert (told["kind"], told["parent"], told["restored"]["step"]) == ("origin", source.sha256, 40)
    (entry,) = Ledger(new / "ledger", readonly=True).entries()
    where = entry.restored
    assert restored.event is not None and where == restored.event.restored
    assert (where["from"], where["head"]) == (f"{run}@good~1", source.ledger.journal.head)
    assert verify(new).ok
    assert f"restored from {run}@good~1" in log_rows(new)[0].note


def test_it_is_the_same_wherever_it_was_restored(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere"
    again.mkdir()
    assert restore_run(str(run), tmp_path / "new").sha256 == restore_run(str(run), again).sha256


def test_a_file_alone_is_enough(tmp_path: Path) -> None:
    sha256 = write_entry(tmp_path / "alone.safetensors", tensors(1), metadata("commit", 5))
    restored = restore_run(str(tmp_path / "alone.safetensors"), tmp_path / "new")
    assert restored.event is not None
    source = restored.event.restored
    assert (source["sha256"], source["head"]) == (sha256, None)
    origin = origin_of(tmp_path / "new")
    assert origin is not None and origin.metadata["parent"] == sha256 and events_of(origin) == 1


@pytest.mark.parametrize("occupied", ["a file in it", "a file", "a run"])
def test_nothing_is_overwritten(run: Path, tmp_path: Path, occupied: str) -> None:
    new = run if occupied == "a run" else tmp_path / "new"
    if occupied == "a file":
        new.write_text("thesis")
    elif occupied == "a file in it":
        new.mkdir()
        (new / "thesis.txt").write_text("thesis")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="Nothing was overwritten"):
        restore_run(str(run), new)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_is_no_patch_is_refused_and_leaves_no_folder(run: Path, tmp_path: Path) -> None:
    write_entry(tmp_path / "snapshot.safetensors", {"w": torch.zeros(2)}, {"snapshot": 1})
    write_entry(tmp_path / "other.safetensors", {"w": torch.zeros(2)}, metadata("commit", 5))
    for reference, message in (("snapshot.safetensors", "not a patch"), ("other.safetensors", "is no sidecar's")):
        with pytest.raises(EntryError, match=message):
            restore_run(str(tmp_path / reference), tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        restore_run(str(tmp_path / "nothing"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_that_was_trained_from_nothing_has_no_origin(run: Path, tmp_path: Path) -> None:
    assert origin_of(run) is None and origin_of(tmp_path / "nothing") is None
