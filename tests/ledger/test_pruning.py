"""What is pruned and what is not: nothing that anything refers to, and nothing while a process trains."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from past_events import RESUME
from past_run import a_trained_run

from revpatch.ledger.journal import JournalError
from revpatch.ledger.ledger import Ledger, lock_run
from revpatch.ledger.maintenance import prune, verify
from revpatch.ledger.patch_file import EntryError, serialise

GOOD = "000_wiki_good_step0000000{}.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    a_trained_run(tmp_path / "run")
    return tmp_path / "run"


def files(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (run / "ledger").iterdir() if path.name != "journal.jsonl"}


def snapshot(run: Path, **metadata: object) -> None:
    (run / "snapshot").mkdir(exist_ok=True)
    journal = Ledger(run / "ledger", readonly=True).journal
    noted = {"events": len(journal.records()), "head": journal.head, **metadata}
    (run / "snapshot/step000000000030.safetensors").write_bytes(serialise({"w": torch.zeros(1)}, noted))


def test_old_good_entries_go_and_what_is_needed_stays(run: Path) -> None:
    before = files(run)
    pruned = prune(run, keep=1)
    gone = [GOOD.format(step) for step in (10, 30, 40)]
    assert pruned.entries == gone
    assert pruned.bytes == sum(before[name] for name in gone)
    assert list(pruned.spared) == [GOOD.format(20)] and "rollback" in pruned.spared[GOOD.format(20)]
    assert files(run) == {name: size for name, size in before.items() if name not in gone}
    assert verify(run).ok
    again = prune(run, keep=1)
    assert (again.entries, again.bytes) == ([], 0)
    assert sum(e["event"] == "pruned" for e in Ledger(run / "ledger", readonly=True).journal.records()) == 1


@pytest.mark.parametrize("copied", [False, True], ids=["in its run", "by itself, under another name"])
def test_a_ledger_may_be_named_by_its_own_folder(
    run: Path, tmp_path: Path, revpatch: Callable[..., Any], copied: bool
) -> None:
    snapshot(run, parent=GOOD.format(30))
    ledger = run / "ledger"
    if copied:
        ledger = shutil.copytree(ledger, tmp_path / "elsewhere")
    told = revpatch("ledger", "log", run, "--json").out.partition(",")[2]
    assert revpatch("ledger", "log", ledger, "--json").out.partition(",")[2] == told
    assert "entries kept" in revpatch("ledger", "log", ledger).out
    assert verify(ledger).directory == ledger and verify(ledger).ok
    with lock_run(run) as held, contextlib.nullcontext() if copied else pytest.raises(ValueError, match="another proc"):
        assert held is not None
        prune(ledger, keep=1, dry_run=True)
    pruned = prune(ledger, keep=1)
    assert (GOOD.format(30) in pruned.entries) == copied, "the snapshot beside a ledger still counts"
    assert verify(ledger).ok and (len(verify(run).problems) == 0)
    (ledger / "journal.jsonl").write_bytes((ledger / "journal.jsonl").read_bytes()[:-40])
    assert not verify(ledger).ok


@pytest.mark.parametrize("named_by", ["name", "sha256"])
def test_what_a_snapshot_goes_on_from_stays(run: Path, named_by: str) -> None:
    entry = next(e for e in Ledger(run / "ledger", readonly=True).entries() if e.name == GOOD.format(30))
    told = {"phase": {"good": {"entry": entry.name}}} if named_by == "name" else {"parent": entry.sha256}
    snapshot(run, **told)
    pruned = prune(run, keep=1)
    assert pruned.entries == [GOOD.format(10), GOOD.format(40)]
    assert "snapshot step000000000030.safetensors" in pruned.spared[entry.name]


def test_a_snapshot_that_cannot_be_read_stops_it(run: Path) -> None:
    snapshot(run)
    path = run / "snapshot/step000000000030.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    before = files(run)
    with pytest.raises(EntryError, match=r"step000000000030\.safetensors is truncated or damaged"):
        prune(run, keep=1)
    assert files(run) == before


def test_the_newest_entry_stays_even_if_it_is_old(run: Path) -> None:
    """Recorded again, as after a resume: it is the newest now."""
    ledger = Ledger(run / "ledger")
    kept = ledger.read(GOOD.format(10))
    ledger.record("good", 0, "wiki", 10, kept.tensors, kept.metadata)
    assert GOOD.format(10) not in prune(run, keep=1).entries


def test_a_dry_run_changes_nothing(run: Path) -> None:
    before = {path: path.read_bytes() for path in (run / "ledger").iterdir()}
    dry = prune(run, keep=2, dry_run=True)
    assert {path: path.read_bytes() for path in (run / "ledger").iterdir()} == before
    wet = prune(run, keep=2)
    assert (dry.entries, dry.bytes, dry.spared) == (wet.entries, wet.bytes, wet.spared) and dry.entries
    assert (dry.dry_run, wet.dry_run) == (True, False)


def test_what_earlier_resumes_set_aside_goes_and_the_newest_ones_stays(run: Path) -> None:
    for _ in range(3):
        ledger = Ledger(run / "ledger")
        kept = ledger.read("000_wiki_commit.safetensors")
        ledger.resume(len(ledger.journal.records()) - 1, **RESUME)
        Ledger(run / "ledger").record("commit", 0, "wiki", 50, kept.tensors, kept.metadata)
    old = run / "ledger/000_wiki_start.safetensors.superseded"
    old.write_bytes(b"of a resume long ago")
    (run / "ledger/notes.superseded").write_text("somebody's own")
    (run / "ledger/000_wiki_start.safetensors.orphan").write_bytes(b"of a crash")
    pruned = prune(run, keep=9)
    assert pruned.leftovers == [
        "000_wiki_commit.safetensors.superseded",
        "000_wiki_commit.safetensors.superseded-2",
        "000_wiki_start.safetensors.superseded",
    ]
    left = sorted(path.name for path in (run / "ledger").iterdir() if path.suffix not in (".safetensors", ".jsonl"))
    assert left == ["000_wiki_commit.safetensors.superseded-3", "000_wiki_start.safetensors.orphan", "notes.superseded"]
    assert verify(run).ok
    event = Ledger(run / "ledger", readonly=True).journal.records()[-1]
    assert (event["event"], event["files"], event["leftovers"]) == ("pruned", [], pruned.leftovers)


def test_not_while_a_process_trains(run: Path) -> None:
    before = files(run)
    lock = lock_run(run)
    assert lock is not None
    with lock, pytest.raises(ValueError, match="is writing to this folder"):
        prune(run, keep=1)
    assert files(run) == before
    assert prune(run, keep=1).entries


def test_where_there_is_no_run_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="is not there"):
        prune(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == []
