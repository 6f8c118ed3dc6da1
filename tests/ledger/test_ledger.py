"""The ledger as a whole: files and journal stay in step through crashes; what is wrong is named; pruned, restored."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from past_events import RESUME, add
from past_run import COMMIT, SETS, START, a_run, a_snapshot, contents, flip, good, metadata, tensors

from revpatch.durable import sha256_of
from revpatch.ledger.journal import Journal, JournalError
from revpatch.ledger.ledger import Ledger, effective, lock_run, read_patch
from revpatch.ledger.log import log_rows
from revpatch.ledger.maintenance import events_of, origin_of, prune, restore_run, verify
from revpatch.ledger.patch_file import EntryError, read_entry, write_entry

NEW = "001_imdb_commit.safetensors"


def names(ledger: Ledger) -> list[str]:
    return [entry.name for entry in ledger.entries()]


def a_patch(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((4,), value)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    a_run(tmp_path / "run")
    return tmp_path / "run"


def test_what_is_recorded_is_found_and_loaded(run: Path) -> None:
    path, sha256 = Ledger(run / "ledger").record("good", 1, "imdb", 100, a_patch(7), {"a": 1}, sets=SETS)
    assert read_entry(path, sha256)[1] == {"a": 1}
    for opened in (Ledger(run / "ledger"), Ledger(run / "ledger", readonly=True)):
        newest, commit = opened.newest(), opened.newest("commit")
        assert newest is not None and newest.name == path.name == "001_imdb_good_step000000100.safetensors"
        assert commit is not None and commit.name == COMMIT
        assert (newest.kind, newest.phase, newest.phase_index, newest.step) == ("good", "imdb", 1, 100)
        assert (newest.sets, newest.made_by, newest.restored, newest.base_at) == (SETS, None, None, None)
        patch = opened.read(newest.name)
        assert (patch.tensors["w"].tolist(), patch.metadata) == ([7] * 4, {"a": 1})
        assert newest.sha256 == sha256 == sha256_of(path.read_bytes())
    before = names(opened)
    ledger = Ledger(run / "ledger")
    ledger.record("good", 1, "imdb", 100, a_patch(7), {"a": 1})
    assert names(ledger) == before, "the same again is fine"
    with pytest.raises(EntryError, match="other content"):
        ledger.record("good", 1, "imdb", 100, a_patch(8), {"a": 1})
    with pytest.raises(EntryError, match="can't be used"):
        ledger.record("start", 0, "../other", 0, a_patch(), {})
    for name in ("../journal.jsonl", "/etc/passwd", ""):
        with pytest.raises(EntryError, match=rf"is not in .*Entries there: {START}"):
            ledger.read(name)
    assert verify(run).ok


def test_an_empty_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    assert (ledger.entries(), ledger.newest(), ledger.set_aside_orphans(), ledger.prune_good(1)) == ([], None, [], [])
    assert [problem.what for problem in verify(tmp_path).problems] == ["is empty"]


def killed(job: Callable[[], object]) -> None:
    """Do a job in a process of its own that must be killed in its midst."""
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            job()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def record(ledger: Ledger) -> None:
    ledger.record("commit", 1, "imdb", 200, a_patch(9), {})


CRASHES: dict[str, tuple[tuple[Any, str], Callable[[Ledger], object], str, list[str], list[str]]] = {
    "before an entry has its name": ((Path, "replace"), record, r"is half-written", [], []),
    "between entry and journal line": (
        (Journal, "append"),
        record,
        r"is in no journal line \(an orphan\)",
        [NEW],
        [NEW],
    ),
    "between a resume's line and the renaming": (
        (Path, "rename"),
        lambda ledger: ledger.resume(8, **RESUME),
        r"is in no journal line \(an orphan\)",
        [COMMIT],
        [COMMIT],
    ),
    "in the middle of pruning": (
        (Path, "unlink"),
        lambda ledger: ledger.prune_good(2),
        "was pruned but is still there",
        [good(10), good(20), good(30)],
        [],
    ),
}
"""Where the process dies, in what, what `verify` says, of which files, and which of them are kept as orphans."""


@pytest.mark.parametrize("moment", CRASHES)
def test_a_process_that_is_killed_leaves_what_is_named_and_mended(
    run: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    where, job, words, strays, kept = CRASHES[moment]
    ledger, before = Ledger(run / "ledger"), contents(run)
    with monkeypatch.context() as patching:
        patching.setattr(*where, die)
        killed(lambda: job(ledger))
    problems = verify(run).problems
    assert {problem.what for problem in problems} == {words.replace("\\", "")}
    found = [problem.where for problem in problems]
    assert found == strays or (not strays and len(found) == 1 and found[0].endswith(".tmp"))
    data = {name: (run / "ledger" / name).read_bytes() for name in found}
    again = Ledger(run / "ledger")
    assert again.set_aside_orphans() == (kept if strays else found)
    assert again.set_aside_orphans() == []
    for name in found:
        assert not (run / "ledger" / name).exists()
        aside = run / "ledger" / f"{name}.orphan"
        assert aside.exists() == (name in kept)
        if name in kept:
            event = again.journal.records()[-1]
            assert aside.read_bytes() == data[name]
            assert (event["event"], event["file"], event["sha256"]) == ("orphan", name, sha256_of(data[name]))
    assert all(path.exists() or path.name in strays for path in before)
    record(again)
    assert verify(run).ok


def test_an_orphan_is_not_written_over_an_earlier_one(run: Path) -> None:
    for value in (1, 2, 3):
        write_entry(run / "ledger" / NEW, a_patch(value), {})
        Ledger(run / "ledger").set_aside_orphans()
    kept = sorted((run / "ledger").glob(f"{NEW}.orphan*"))
    assert [path.name for path in kept] == [f"{NEW}.orphan{end}" for end in ("", "-2", "-3")]
    assert len({path.read_bytes() for path in kept}) == 3


def test_resuming_sets_aside_what_came_after_and_it_may_be_written_anew(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    ledger = Ledger(folder)
    ledger.record("start", 0, "a", 0, a_patch(1), {})
    noted = len(ledger.journal.records()), ledger.journal.head
    ledger.record("good", 0, "a", 5, a_patch(2), {})
    add(ledger.journal, "commit")
    ledger.record("commit", 0, "a", 5, a_patch(2), {})
    again = Ledger(folder)
    assert again.journal.head_after(noted[0]) == noted[1]
    superseded = again.resume(noted[0], **RESUME | {"snapshot": "step5.safetensors"})
    assert superseded == ["000_a_good_step000000005.safetensors", "000_a_commit.safetensors"]
    assert names(again) == names(Ledger(folder, readonly=True)) == ["000_a_start.safetensors"]
    assert sorted(path.name for path in folder.glob("*.superseded")) == sorted(f"{n}.superseded" for n in superseded)
    assert verify(tmp_path).ok
    again.record("good", 0, "a", 5, a_patch(3), {})  # other content, as on another number of ranks
    assert again.resume(noted[0], **RESUME) == ["000_a_good_step000000005.safetensors"], "and once more"
    assert (folder / "000_a_good_step000000005.safetensors.superseded-2").exists()
    events = [event.event for event in effective(again.journal.events())]
    assert events == ["entry", "resume"], "what was undone does not count"


# Is it whole.


def _cut_journal(run: Path, lines: int = 1) -> None:
    journal = run / "ledger/journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-lines]))


def _half_a_line(run: Path) -> None:
    with (run / "ledger/journal.jsonl").open("ab") as file:
        file.write(b'{"seq":11')


def _cut_snapshot(run: Path) -> None:
    (path := a_snapshot(run)).write_bytes(path.read_bytes()[:100])


def _cut_after_snapshot(run: Path) -> None:
    a_snapshot(run)
    _cut_journal(run)
    (run / "ledger" / COMMIT).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "nothing": (a_snapshot, {}),
    "missing": (lambda run: (run / "ledger" / START).unlink(), {START: "is missing (journal line 1)"}),
    "a flipped bit": (lambda run: flip(run / "ledger" / COMMIT), {COMMIT: "has sha256"}),
    "a file cut": (lambda run: (run / "ledger" / COMMIT).write_bytes(b"1234567"), {COMMIT: "has 7 bytes, expected"}),
    "a stranger": (lambda run: write_entry(run / "ledger" / NEW, a_patch(), {}), {NEW: "is in no journal line"}),
    "half a line": (_half_a_line, {"journal.jsonl": "its last line is cut short (9 bytes"}),
    "a line lost": (_cut_journal, {COMMIT: "is in no journal line (an orphan)"}),
    "a line and its file lost": (_cut_after_snapshot, {"journal.jsonl": "step000000000030.safetensors noted line 9"}),
    "a snapshot cut": (_cut_snapshot, {"snapshot/step000000000030.safetensors": "is no whole snapshot"}),
    "all lost": (lambda run: shutil.rmtree(run / "ledger"), {"/ledger/journal.jsonl": "is not there"}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_verify_names_what_is_wrong_and_nothing_else(run: Path, case: str) -> None:
    damage, expected = DAMAGE[case]
    head = Ledger(run / "ledger").journal.head
    damage(run)
    before = contents(run)
    report = verify(run)
    assert [problem.where.removeprefix(str(run)) for problem in report.problems] == list(expected)
    for problem, words in zip(report.problems, expected.values(), strict=True):
        assert words in problem.what and problem.advice
    assert verify(run, hash_files=False).ok == (report.ok or case == "a flipped bit")
    assert contents(run) == before
    if case == "nothing":
        sizes = sum(path.stat().st_size for path in (run / "ledger").glob("*.safetensors"))
        assert (report.entries, report.events, report.head, report.bytes_hashed) == (8, 9, head, sizes)
        assert verify(run, hash_files=False).bytes_hashed == 0
        add(Ledger(run / "ledger").journal, "interrupted")
        assert verify(run, head).ok
    if case == "a line lost":
        assert any(head in problem.what for problem in verify(run, head).problems)


# Making room.


def test_old_good_entries_go_and_what_is_needed_stays(run: Path) -> None:
    before, gone = contents(run / "ledger"), [good(step) for step in (10, 30, 40)]
    dry = prune(run, keep=1, dry_run=True)
    assert contents(run / "ledger") == before
    pruned = prune(run, keep=1)
    assert (dry.dry_run, pruned.dry_run, pruned.entries) == (True, False, gone)
    assert (dry.entries, dry.bytes, dry.spared) == (pruned.entries, pruned.bytes, pruned.spared)
    assert pruned.bytes == sum(len(before[run / "ledger" / name]) for name in gone)
    assert list(pruned.spared) == [good(20)] and "rollback" in pruned.spared[good(20)]
    assert {path.name for path in before} - {path.name for path in contents(run / "ledger")} == set(gone)
    event = Ledger(run / "ledger").journal.records()[-1]
    assert (event["event"], event["files"]) == ("pruned", gone)
    again = prune(run, keep=1)
    assert (again.entries, again.bytes) == ([], 0)
    assert len(Ledger(run / "ledger").journal.records()) == 10, "nothing to be said of nothing"
    with pytest.raises(EntryError, match="was pruned"):
        Ledger(run / "ledger").read(gone[0])
    assert verify(run).ok


def test_a_ledger_prunes_itself_by_phase_and_keeps_the_last_good_entry(run: Path) -> None:
    ledger = Ledger(run / "ledger")
    kept = ledger.read(good(10))
    ledger.record("good", 0, "wiki", 10, kept.tensors, kept.metadata)  # recorded again: the newest now
    ledger.record("good", 1, "imdb", 5, a_patch(), {})
    assert ledger.prune_good(2) == [good(20), good(30), good(40)]
    assert ledger.prune_good(2) == [] and verify(run).ok
    for keep in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            ledger.prune_good(keep)


@pytest.mark.parametrize("named_by", ["name", "sha256"])
def test_what_a_snapshot_resumes_from_stays(run: Path, named_by: str) -> None:
    entry = next(e for e in Ledger(run / "ledger", readonly=True).entries() if e.name == good(30))
    told: dict[str, Any] = (
        {"phase": {"good": {"entry": entry.name}}} if named_by == "name" else {"parent": entry.sha256}
    )
    a_snapshot(run, **told)
    pruned = prune(run, keep=1)
    assert pruned.entries == [good(10), good(40)]
    assert "snapshot step000000000030.safetensors" in pruned.spared[entry.name]


def test_when_nothing_is_pruned(run: Path, tmp_path: Path) -> None:
    """While a process trains; when it can't be known what a snapshot needs; where there is no run."""
    before = contents(run / "ledger")
    lock = lock_run(run)
    assert lock is not None
    with lock:
        for place in (run, run / "ledger"):
            with pytest.raises(ValueError, match="is writing to this folder"):
                prune(place, keep=1)
    _cut_snapshot(run)
    with pytest.raises(EntryError, match=r"step000000000030\.safetensors is truncated or damaged"):
        prune(run, keep=1)
    assert contents(run / "ledger") == before
    with pytest.raises(JournalError, match="is not there"):
        prune(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == [run]


def test_what_earlier_resumes_set_aside_goes_and_the_newest_ones_stays(run: Path) -> None:
    for _ in range(3):
        ledger = Ledger(run / "ledger")
        kept = ledger.read(COMMIT)
        ledger.resume(len(ledger.journal.records()) - 1, **RESUME)
        Ledger(run / "ledger").record("commit", 0, "wiki", 50, kept.tensors, kept.metadata)
    own = {f"{START}.superseded", "notes.superseded", f"{START}.orphan"}
    for name in own:
        (run / "ledger" / name).write_bytes(b"of long ago, of somebody, of a crash")
    pruned = prune(run, keep=9)
    gone = [f"{COMMIT}.superseded", f"{COMMIT}.superseded-2", f"{START}.superseded"]
    assert pruned.leftovers == gone
    left = {path.name for path in (run / "ledger").iterdir() if path.suffix not in (".safetensors", ".jsonl")}
    assert left == {f"{COMMIT}.superseded-3"} | own - set(gone)
    event = Ledger(run / "ledger", readonly=True).journal.records()[-1]
    assert (event["event"], event["files"], event["leftovers"]) == ("pruned", [], gone)
    assert verify(run).ok


def test_a_ledger_may_be_copied_by_itself_under_any_name(run: Path, tmp_path: Path) -> None:
    a_snapshot(run, parent=good(30))
    alone = shutil.copytree(run / "ledger", tmp_path / "elsewhere")
    assert log_rows(alone) == log_rows(run / "ledger") == log_rows(run)
    for place, needed in ((alone, False), (run / "ledger", True)):
        assert verify(place).directory == place and verify(place).ok
        assert (good(30) in prune(place, keep=1).spared) == needed, "the snapshot beside a ledger counts"
        assert verify(place).ok
    assert read_patch(alone).path == alone / COMMIT


# Restoring.


def test_a_restored_run_begins_with_the_patch(run: Path, tmp_path: Path) -> None:
    new, before = tmp_path / "deep/new", contents(run)
    restored = restore_run(f"{run}@good~1", new)
    assert contents(run) == before, "the old run is as it was"
    assert sorted(path.name for path in (new / "ledger").iterdir()) == ["000_wiki_origin.safetensors", "journal.jsonl"]
    source, patch = read_patch(f"{run}@good~1"), read_patch(f"{new}@origin")
    assert source.ledger is not None and restored.event is not None and patch.event is not None
    assert patch.tensors.keys() == source.tensors.keys()
    assert all(torch.equal(patch.tensors[name], tensor) for name, tensor in source.tensors.items())
    told, where = patch.metadata, patch.event.restored
    assert (told["kind"], told["parent"], told["restored"]["step"]) == ("origin", source.sha256, 40)
    assert where is not None and where == restored.event.restored
    assert (where["from"], where["head"]) == (f"{run}@good~1", source.ledger.journal.head)
    assert verify(new).ok and f"restored from {run}@good~1" in log_rows(new)[0].note
    (tmp_path / "there").mkdir()
    assert restore_run(f"{run}@good~1", tmp_path / "there").sha256 == restored.sha256, "the same wherever it is"
    origin = origin_of(new)
    assert origin is not None and origin.metadata["parent"] == source.sha256 and events_of(origin) == 1
    assert origin_of(run) is None and origin_of(tmp_path / "nothing") is None
    sha256 = write_entry(tmp_path / "alone.safetensors", tensors(1), metadata("commit", 5))
    alone = restore_run(str(tmp_path / "alone.safetensors"), tmp_path / "another").event
    assert alone is not None and alone.restored is not None
    assert (alone.restored["sha256"], alone.restored["head"]) == (sha256, None)


@pytest.mark.parametrize("occupied", ["a file in it", "a file", "a run"])
def test_restoring_overwrites_nothing(run: Path, tmp_path: Path, occupied: str) -> None:
    new = run if occupied == "a run" else tmp_path / "new"
    if occupied == "a file":
        new.write_text("thesis")
    elif occupied == "a file in it":
        new.mkdir()
        (new / "thesis.txt").write_text("thesis")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="Nothing was overwritten"):
        restore_run(str(run), new)
    assert contents(tmp_path) == before


def test_what_is_no_patch_is_not_restored_and_leaves_no_folder(tmp_path: Path) -> None:
    write_entry(tmp_path / "snapshot.safetensors", {"w": torch.zeros(2)}, {"snapshot": 1})
    write_entry(tmp_path / "other.safetensors", {"w": torch.zeros(2)}, metadata("commit", 5))
    for reference, error, words in (
        ("snapshot.safetensors", EntryError, "not a patch"),
        ("other.safetensors", EntryError, "is no sidecar's"),
        ("nothing", FileNotFoundError, "no such file"),
    ):
        with pytest.raises(error, match=words):
            restore_run(str(tmp_path / reference), tmp_path / "new")
    assert not (tmp_path / "new").exists()
