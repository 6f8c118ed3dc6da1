"""The ledger as a whole: files and journal stay in step through crashes, and what is wrong is named."""

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from past_events import KNOWN, RESUME, add, add_line
from past_run import SETS, a_patch, a_run
from rich.console import Console

from revpatch.durable import sha256_of
from revpatch.ledger.journal import Journal, JournalError
from revpatch.ledger.ledger import Ledger, effective
from revpatch.ledger.log import log_rows, print_log
from revpatch.ledger.maintenance import verify
from revpatch.ledger.patch_file import EntryError, read_entry, write_entry


def names(ledger):
    return [entry.name for entry in ledger.entries()]


def interrupted(code: str, directory) -> None:
    """Runs `code` in a process that is to be killed by SIGKILL half-way."""
    setting = (
        "import os, signal, sys, torch; from pathlib import Path\n"
        "from revpatch.ledger.ledger import Ledger\n"
        "def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
        "ledger = Ledger(Path(sys.argv[1])); patch = {'layer_00.gate.weight': torch.full((4,), 9.0)}\n"
    )
    process = subprocess.run([sys.executable, "-c", setting + code, str(directory)], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


def test_what_is_recorded_is_found_and_loaded(tmp_path):
    run, ledger = a_run(tmp_path)
    for opened in (ledger, Ledger(run / "ledger"), Ledger(run / "ledger", readonly=True)):
        assert opened.newest().name == "001_imdb_good_step000000100.safetensors"
        assert opened.newest("commit").name == "000_wikitext_commit.safetensors"
        good = opened.entries()[2]
        assert (good.kind, good.phase, good.phase_index, good.step) == ("good", "wikitext", 0, 200)
        assert (good.sets, good.made_by, good.restored, good.base_at) == (SETS, None, None, None)
        tensors, metadata = (patch := opened.read(good.name)).tensors, patch.metadata
        assert tensors["layer_00.gate.weight"].tolist() == [200.0] * 4
        assert metadata == {"step": 200}
        assert good.sha256 == sha256_of((run / "ledger" / good.name).read_bytes())
    assert verify(run).ok


def test_the_path_and_sha256_that_are_returned_open_the_entry(tmp_path):
    _, ledger = a_run(tmp_path)
    path, sha256 = ledger.record("commit", 1, "imdb", 200, a_patch(3), {"a": 1})
    assert path == ledger.directory / "001_imdb_commit.safetensors"
    assert read_entry(path, sha256)[1] == {"a": 1}


def test_an_empty_ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    assert (ledger.entries(), ledger.newest(), ledger.set_aside_orphans(), ledger.prune_good(1)) == ([], None, [], [])
    assert [problem.what for problem in verify(tmp_path).problems] == ["is empty"]


def test_recording_the_same_again_is_fine_and_other_content_is_refused(tmp_path):
    run, ledger = a_run(tmp_path)
    before = names(ledger)
    ledger.record("good", 1, "imdb", 100, a_patch(700), {"step": 100})
    assert names(ledger) == before
    with pytest.raises(EntryError, match="other content"):
        ledger.record("good", 1, "imdb", 100, a_patch(701), {"step": 100})
    assert ledger.read(before[-1]).tensors["layer_00.gate.weight"][0] == 700
    assert verify(run).ok


@pytest.mark.parametrize("phase", ["../other", "a/b", "/tmp/x", "..", "a\0b"])
def test_a_phase_name_cannot_leave_the_ledger(tmp_path, phase):
    run, ledger = a_run(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EntryError, match="can't be used"):
        ledger.record("start", 0, phase, 0, a_patch(), {})
    assert sorted(tmp_path.rglob("*")) == before
    assert verify(run).ok


@pytest.mark.parametrize("name", ["../journal.jsonl", "/etc/passwd", "000_nothing_start.safetensors", ""])
def test_only_what_is_in_the_journal_is_loaded(tmp_path, name):
    _, ledger = a_run(tmp_path)
    with pytest.raises(EntryError, match=r"is not in .*Entries there: 000_wikitext_start\.safetensors"):
        ledger.read(name)


def test_a_file_that_was_replaced_is_not_loaded(tmp_path):
    _, ledger = a_run(tmp_path)
    path = ledger.directory / "000_wikitext_commit.safetensors"
    path.unlink()
    write_entry(path, a_patch(666), {"phase": "wikitext"})
    with pytest.raises(EntryError, match="is not the file that was recorded"):
        ledger.read(path.name)


def test_a_journal_line_that_points_elsewhere_is_refused(tmp_path):
    run = tmp_path / "run"
    journal = Journal(run / "ledger" / "journal.jsonl")
    add_line(journal, "entry", **KNOWN["entry"] | {"file": "../../secret.safetensors"})
    with pytest.raises(JournalError, match=r"line 1 .*'\.\./\.\./secret\.safetensors' can't be used"):
        Ledger(run / "ledger")
    (problem,) = verify(run).problems
    assert "can't be used" in problem.what


def test_pruning_keeps_the_newest_good_entries_of_each_phase(tmp_path):
    run, ledger = a_run(tmp_path)
    others = [entry.name for entry in ledger.entries() if entry.kind != "good"]
    removed = ledger.prune_good(2)
    assert removed == ["000_wikitext_good_step000000100.safetensors", "000_wikitext_good_step000000200.safetensors"]
    assert [name for name in names(ledger) if "good" in name] == [
        "000_wikitext_good_step000000300.safetensors",
        "000_wikitext_good_step000000400.safetensors",
        "001_imdb_good_step000000100.safetensors",
    ]
    assert sorted(path.name for path in ledger.directory.glob("*.safetensors")) == sorted(names(ledger))
    assert set(others) < set(names(ledger))
    assert ledger.prune_good(2) == []
    event = ledger.journal.records()[-1]
    assert (event["event"], event["files"]) == ("pruned", removed)
    assert names(Ledger(run / "ledger")) == names(ledger)
    assert verify(run).ok
    with pytest.raises(EntryError, match="was pruned"):
        ledger.read(removed[0])


@pytest.mark.parametrize("keep", [0, -1])
def test_the_last_good_entry_is_never_pruned(tmp_path, keep):
    _, ledger = a_run(tmp_path)
    with pytest.raises(ValueError, match="at least 1"):
        ledger.prune_good(keep)


def test_killed_between_entry_and_journal_line(tmp_path):
    run, ledger = a_run(tmp_path)
    interrupted("ledger.journal.append = die\nledger.record('commit', 1, 'imdb', 200, patch, {})", ledger.directory)
    orphan = ledger.directory / "001_imdb_commit.safetensors"
    content = orphan.read_bytes()
    (problem,) = verify(run).problems
    assert (problem.where, "orphan" in problem.what) == (orphan.name, True)

    started_again = Ledger(run / "ledger")
    assert started_again.set_aside_orphans() == [orphan.name]
    assert not orphan.exists()
    assert orphan.with_name(orphan.name + ".orphan").read_bytes() == content
    event = started_again.journal.records()[-1]
    assert (event["event"], event["file"], event["sha256"]) == ("orphan", orphan.name, sha256_of(content))
    assert started_again.set_aside_orphans() == []
    assert verify(run).ok
    started_again.record("commit", 1, "imdb", 200, a_patch(8), {})
    assert verify(run).ok


def test_an_orphan_is_not_written_over_an_earlier_one(tmp_path):
    run, ledger = a_run(tmp_path)
    for value in (1, 2, 3):
        write_entry(ledger.directory / "001_imdb_commit.safetensors", a_patch(value), {})
        Ledger(run / "ledger").set_aside_orphans()
    kept = sorted(ledger.directory.glob("001_imdb_commit.safetensors.orphan*"))
    assert [path.name for path in kept] == [f"001_imdb_commit.safetensors.orphan{end}" for end in ("", "-2", "-3")]
    assert len({path.read_bytes() for path in kept}) == 3


def test_killed_before_an_entry_has_its_name(tmp_path):
    run, ledger = a_run(tmp_path)
    interrupted("Path.replace = die\nledger.record('commit', 1, 'imdb', 200, patch, {})", ledger.directory)
    (half,) = ledger.directory.glob(".*.tmp")
    assert [problem.where for problem in verify(run).problems] == [half.name]
    assert Ledger(run / "ledger").set_aside_orphans() == [half.name]
    assert not half.exists()
    assert verify(run).ok


def test_killed_in_the_middle_of_pruning(tmp_path):
    run, ledger = a_run(tmp_path)
    interrupted("Path.unlink = die\nledger.prune_good(1)", ledger.directory)
    surplus = {f"000_wikitext_good_step000000{step}.safetensors" for step in (100, 200, 300)}
    assert {problem.where for problem in verify(run).problems} == surplus
    started_again = Ledger(run / "ledger")
    assert started_again.set_aside_orphans() == []
    assert not any((run / "ledger" / name).exists() for name in surplus)
    assert verify(run).ok


def test_a_disk_that_is_full(tmp_path):
    directory = tmp_path / "run" / "ledger"
    ledger = Ledger(directory)
    ledger.record("start", 0, "a", 0, a_patch(), {})
    with full_disk(64_000), pytest.raises(OSError, match="File too large"):
        ledger.record("commit", 0, "a", 9, {"w": torch.zeros(50_000)}, {})
    assert [path.name for path in sorted(directory.iterdir())] == ["000_a_start.safetensors", "journal.jsonl"]
    ledger.record("commit", 0, "a", 9, a_patch(2), {})
    assert verify(tmp_path / "run").ok


def test_reading_functions_change_nothing(tmp_path):
    run, ledger = a_run(tmp_path)
    write_entry(ledger.directory / "002_new_start.safetensors", a_patch(), {})
    with ledger.journal.path.open("ab") as file:
        file.write(b"{")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    log_rows(run)
    verify(run)
    Ledger(run / "ledger", readonly=True)
    print_log(run, Console(file=io.StringIO()))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_going_back_sets_aside_what_came_after_and_it_may_be_written_anew(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    ledger = Ledger(folder)
    ledger.record("start", 0, "a", 0, a_patch(1), {})
    noted = len(ledger.journal.records()), ledger.journal.head
    ledger.record("good", 0, "a", 5, a_patch(2), {})
    add(ledger.journal, "commit")
    ledger.record("commit", 0, "a", 5, a_patch(2), {})

    again = Ledger(folder)
    assert again.journal.head_after(noted[0]) == noted[1]
    assert again.journal.head_after(99) is None
    superseded = again.resume(noted[0], **RESUME | {"snapshot": "step5.safetensors"})
    assert superseded == ["000_a_good_step000000005.safetensors", "000_a_commit.safetensors"]
    assert [entry.name for entry in again.entries()] == ["000_a_start.safetensors"]
    assert sorted(path.name for path in folder.glob("*.superseded")) == sorted(f"{n}.superseded" for n in superseded)
    assert verify(tmp_path).ok
    again.record("good", 0, "a", 5, a_patch(3), {})  # other content, as on another number of ranks
    assert again.resume(noted[0], **RESUME) == ["000_a_good_step000000005.safetensors"], "and once more"
    assert (folder / "000_a_good_step000000005.safetensors.superseded-2").exists()

    events = [event.event for event in effective(again.journal.events())]
    assert events == ["entry", "resume"], "what was undone does not count"
    assert [entry.name for entry in Ledger(folder, readonly=True).entries()] == ["000_a_start.safetensors"]


def test_a_crash_while_going_back_loses_nothing(tmp_path: Path) -> None:
    """Between the journal's line and the renaming."""
    folder = tmp_path / "ledger"
    ledger = Ledger(folder)
    ledger.record("start", 0, "a", 0, a_patch(1), {})
    ledger.record("commit", 0, "a", 5, a_patch(2), {})
    add(ledger.journal, "resume", undoes_from=1, superseded=["000_a_commit.safetensors"])
    again = Ledger(folder)
    assert [entry.name for entry in again.entries()] == ["000_a_start.safetensors"]
    assert again.set_aside_orphans() == ["000_a_commit.safetensors"]
    assert (folder / "000_a_commit.safetensors.orphan").exists()
