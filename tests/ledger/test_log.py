"""The log: what happened, what of it still counts, and how it is printed; a damaged journal is not told as if whole."""

import io
import math
from pathlib import Path

import pytest
from past_events import BASE, RESUME, add, add_line, reading
from past_run import SETS, a_patch, a_run
from rich.console import Console

from revpatch.ledger.journal import Journal, JournalError
from revpatch.ledger.ledger import Ledger
from revpatch.ledger.log import log_rows, print_log


def test_the_log_says_what_happened(tmp_path):
    run, ledger = a_run(tmp_path)
    add_line(ledger.journal, "quarantined", shard="data/x.tar", phase="imdb")
    add(ledger.journal, "probe", phase="imdb", step=7, sets={"base": reading(math.nan)})
    add_line(ledger.journal, "probe", phase=None, step="many", bytes=[1], sets={"base": {"loss": "?"}, "b": 2.0}, x={})
    ledger.prune_good(1)
    rows = log_rows(run)
    assert [row.seq for row in rows] == list(range(15))
    good = rows[2]
    assert (good.event, good.kind, good.phase, good.step) == ("entry", "good", "wikitext", 100)
    assert good.bytes == (run / "ledger" / "000_wikitext_good_step000000400.safetensors").stat().st_size
    assert good.probes == SETS
    rollback = rows[7]
    assert (rollback.event, rollback.kind, rollback.step) == ("rollback", "", 500)
    for piece in (
        "base rose by 0.1 nats",
        "000_wikitext_good_step000000400.safetensors",
        "steps 400 to 500",
        "factor 0.5",
    ):
        assert piece in rollback.note
    assert (rows[11].event, rows[11].note) == ("quarantined", "shard data/x.tar")
    assert math.isnan(rows[12].probes["base"].loss)
    assert (rows[13].step, rows[13].bytes, rows[13].probes) == (None, None, {})
    assert rows[13].note.startswith("no proper event of its kind: field phase: ")
    assert "000_wikitext_good_step000000100.safetensors" in rows[14].note


@pytest.mark.parametrize("width", [40, 200])
def test_the_printed_log(tmp_path, width):
    run, ledger = a_run(tmp_path)
    add(ledger.journal, "probe", phase="[red]imdb[/red]", sets={"bad": reading(3.5, 3.4)})
    text = io.StringIO()
    print_log(run, Console(file=text, width=width))
    lines = text.getvalue().splitlines()
    commit = next(number for number, line in enumerate(lines) if "commit entry" in line)
    assert lines[commit].startswith("#8  20")
    for piece in ("wikitext step 600", " B  ", ledger.newest("commit").sha256[:12]):
        assert piece in lines[commit]
    assert lines[commit + 1 : commit + 3] == ["    000_wikitext_commit.safetensors", "    base 3.420 (+0.020 / 0.03)"]
    assert any("base rose by 0.1 nats" in line for line in lines)
    assert any("[red]imdb[/red] step 0  probe" in line for line in lines)
    assert lines[-3] == "     bad 3.500 (+0.100 / 0.03)"
    assert lines[-2].startswith("9 entries kept")
    assert "newest 001_imdb_good_step000000100.safetensors; newest commit 000_wikitext_commit.safetensors" in lines[-2]
    assert lines[-1] == f"head of the journal: {ledger.journal.head}"


def test_a_rise_above_tolerance_stands_out(tmp_path):
    journal = Journal(tmp_path / "ledger" / "journal.jsonl")
    for rise in (0.01, 0.5, math.nan):
        add(journal, "probe", sets={"base": reading(rise=rise)})
    add(journal, "probe", sets={"base": reading(rise=0.5, guarded=False)})
    text = io.StringIO()
    print_log(tmp_path, Console(file=text, width=200, force_terminal=True, color_system="standard"))
    readings = [line for line in text.getvalue().splitlines() if "base" in line]
    assert ["\x1b[31m(" in line for line in readings] == [False, True, True, False]


def test_a_damaged_journal_is_not_logged_as_if_it_were_whole(tmp_path):
    run, ledger = a_run(tmp_path)
    lines = ledger.journal.path.read_bytes().splitlines(keepends=True)
    ledger.journal.path.write_bytes(b"".join(lines[1:]))
    for reader in (log_rows, lambda run: Ledger(run / "ledger"), lambda run: print_log(run, Console())):
        with pytest.raises(JournalError, match="line 1 "):
            reader(run)


def test_the_last_hundred_are_shown_or_all(tmp_path):
    journal = Journal(tmp_path / "ledger" / "journal.jsonl")
    for step in range(103):
        add(journal, "probe", step=step, sets=SETS)
    for last, first, count in ((100, "#3 ", 100), (None, "#0 ", 103)):
        text = io.StringIO()
        print_log(tmp_path, Console(file=text, width=200), last)
        shown = [line for line in text.getvalue().splitlines() if line.startswith("#")]
        assert len(shown) == count and shown[0].startswith(first)
        assert ("3 earlier events are not shown: --all" in text.getvalue()) == (last is not None)


def test_what_no_longer_counts_says_so(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    for step in (1, 2, 3):
        ledger.record("good", 0, "a", step, a_patch(step), {})
    ledger.prune_good(2)
    noted = len(ledger.journal.records())
    add(ledger.journal, "probe", step=4)
    ledger.record("good", 0, "a", 4, a_patch(4), {})
    ledger.prune_good(2)
    ledger.resume(noted, **RESUME | {"snapshot": "step3.safetensors", "changed": {"monitoring.every": [4, 2]}})
    ledger.record("good", 0, "a", 4, a_patch(5), {})
    ledger.record("good", 0, "a", 4, a_patch(5), {})
    rows = log_rows(tmp_path)
    states = ["pruned", "pruned", "kept", "", "undone", "superseded", "", "", "recorded again", "kept"]
    assert [row.state for row in rows] == states
    for words in (
        "on from snapshot step3.safetensors",
        "monitoring.every now 2",
        "000_a_good_step000000004.safetensors",
        "from #4",
    ):
        assert words in rows[7].note
    text = io.StringIO()
    print_log(tmp_path, Console(file=text, width=200))
    (line,) = (line for line in text.getvalue().splitlines() if line.startswith("#5 "))
    assert line.endswith("  superseded")
    assert "2 entries kept" in text.getvalue()


def test_what_was_made_says_how(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    made = [
        {"operation": "revert", "phase": "a", "method": "difference", "forced": "base rose by 0.1"},
        {"operation": "revert", "phase": "a", "method": "bypass", "layers": [3, 7]},
        {"operation": "merge", "parents": ["1" * 64, "2" * 64], "weights": [0.5, 0.5]},
        {"operation": "import", "sha256": "3" * 64, "made_by": None},
    ]
    for index, how in enumerate(made):
        ledger.record("commit", index, "x", 0, a_patch(index), {}, made_by=how)
    assert [row.note for row in log_rows(tmp_path)] == [
        "000_x_commit.safetensors, revert of a, forced: base rose by 0.1",
        "001_x_commit.safetensors, revert of a by bypassing the sidecars after blocks 3, 7",
        "002_x_commit.safetensors, merge of 111111111111…, 222222222222… with weights 0.5, 0.5",
        "003_x_commit.safetensors, import of 333333333333…",
    ]
    text = io.StringIO()
    print_log(tmp_path, Console(file=text, width=200))
    assert "newest 003_x_commit.safetensors; newest commit 003_x_commit.safetensors" in text.getvalue()


def test_a_journal_cannot_steer_the_terminal(tmp_path: Path) -> None:
    add(Journal(tmp_path / "ledger/journal.jsonl"), "quarantine", phase="a\x1b[2Jb", reason="one\ntwo\r")
    text = io.StringIO()
    print_log(tmp_path, Console(file=text, width=200))
    assert "\x1b" not in text.getvalue() and "a?[2Jb" in text.getvalue() and "one?two?" in text.getvalue()


def test_a_run_is_told_by_its_base_and_ranks(tmp_path: Path) -> None:
    base = {**BASE, "model": "gpt2", "sha256": "c0ffee" * 10}
    journal = Journal(tmp_path / "ledger/journal.jsonl")
    add(journal, "run", base=base, seed=7, facts={"ranks": 2, "lanes": 8})
    assert log_rows(tmp_path)[0].note == "base gpt2 (float32, sha256 c0ffeec0ffee…), ranks 2, seed 7"
