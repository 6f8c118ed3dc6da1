"""`revpatch ledger ...` as a person meets it, on a folder whose base model is nowhere; and on folders that lie."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Call, one_line
from past_events import BASE, RESUME, add, add_line, reading
from past_run import COMMIT, SETS, START, a_run, a_snapshot, contents, flip, good, metadata, tensors
from rich.console import Console

from revpatch.durable import sha256_of
from revpatch.ledger.journal import Journal
from revpatch.ledger.ledger import Ledger
from revpatch.ledger.log import log_rows, print_log
from revpatch.ledger.patch_file import write_entry


@pytest.fixture
def ledger(revpatch: Call) -> Call:
    """ledger(*arguments): `revpatch ledger ...`, in this process."""
    return partial(revpatch, "ledger")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    a_run(tmp_path / "a run [b] :bug:")
    return tmp_path / "a run [b] :bug:"


def printed(run: Path, **how: Any) -> list[str]:
    """Return the lines of `ledger log`."""
    text = io.StringIO()
    print_log(run, Console(file=text, **{"width": 200, **how}))
    return text.getvalue().splitlines()


def test_every_command_as_text_and_as_json(run: Path, tmp_path: Path, ledger: Call) -> None:
    text, told = ledger("log", run), ledger("log", run, "--json").json()
    assert (text.code, text.err) == (0, "")
    for words in ("wiki step 25  rollback", f"base rose; back to {good(20)}", "base 3.050", "entries kept"):
        assert words in text.out
    records = Ledger(run / "ledger", readonly=True).journal
    assert told["head"] == records.head
    assert [{k: v for k, v in event.items() if k != "state"} for event in told["events"]] == records.records()
    assert [event["state"] for event in told["events"] if event["event"] == "entry"] == ["kept"] * 8

    told = ledger("verify", run, "--json").json()
    assert told["ok"] and told["entries"] == 8 and told["hashed"] and told["problems"] == []
    assert "✓ the chain holds and every file is as recorded: 9 events, 8 entries" in ledger("verify", run).out
    assert "every file is there, with its size" in ledger("verify", run, "--no-hash").out
    assert ledger("verify", run, "--head", told["head"]).code == 0
    wrong = ledger("verify", run, "--head", "0" * 64)
    assert wrong.code == 1 and "0" * 64 in wrong.out and "✓" not in wrong.out
    wrong = ledger("verify", run, "--head", "0" * 64, "--json")
    assert wrong.code == 1 and json.loads(wrong.out)["problems"][0]["where"] == "journal.jsonl"

    assert f"{COMMIT} in " in ledger("show", run).out
    told = ledger("show", f"{run}@good~1", "--json").json()
    assert told["recorded"]["step"] == 40 and len(told["layers"]) == 2
    assert "cosine" in ledger("diff", f"{run}@start", run).out
    told = ledger("diff", f"{run}@start", run, "--json").json()
    assert told["probes"]["base"]["loss"] == [3.0, 3.05] and len(told["layers"]) == 2

    assert f"--set output_dir={tmp_path / 'new'}" in ledger("restore", run, "--as-new-run", tmp_path / "new").out
    told = ledger("restore", f"{run}@good~4", "--as-new-run", tmp_path / "other", "--json").json()
    assert told["name"] == "000_wiki_origin.safetensors" and told["source"]["step"] == 10
    dry = ledger("prune", run, "--keep", "3", "--dry-run")
    assert f"would remove {good(10)}" in dry.out
    assert f"kept {good(20)}: the rollback of journal line 5" in dry.out
    told = ledger("prune", run, "--keep", "3", "--json").json()
    assert told["entries"] == [good(10)] and told["bytes"] > 0
    assert "0 entries and 0 files" in ledger("prune", run, "--keep", "3").out
    assert ledger("verify", run).code == 0


def test_a_patch_with_nan_is_still_json(tmp_path: Path, ledger: Call) -> None:
    broken, path = tensors(1), tmp_path / "a.safetensors"
    broken["00.coupling.f.up.bias"][0] = float("nan")
    write_entry(path, broken, metadata("rollback", 5))
    assert ledger("show", path, "--json").json()["layers"][0]["norm"] == "NaN"
    assert ledger("diff", path, path, "--json").json()["layers"][0]["distance"] == "NaN"
    assert "nan" in ledger("show", path).out


# The log: what happened, and what of it still counts.


def test_the_log_says_what_happened(run: Path) -> None:
    ledger = Ledger(run / "ledger")
    add_line(ledger.journal, "quarantined", shard="data/x.tar", phase="imdb")
    add(ledger.journal, "probe", phase="imdb", step=7, sets={"base": reading(math.nan)})
    add_line(ledger.journal, "probe", phase=None, step="many", bytes=[1], sets={"base": {"loss": "?"}, "b": 2.0}, x={})
    Ledger(run / "ledger").prune_good(4)
    base = {**BASE, "model": "gpt2", "sha256": "c0ffee" * 10}
    add(Journal(run / "ledger/journal.jsonl"), "run", base=base, seed=7, facts={"ranks": 2, "lanes": 8})
    rows = log_rows(run)
    assert [row.seq for row in rows] == list(range(14))
    assert (rows[1].event, rows[1].kind, rows[1].phase, rows[1].step) == ("entry", "good", "wiki", 10)
    assert rows[2].bytes == (run / "ledger" / good(20)).stat().st_size and rows[2].probes["base"].loss == 3.02
    assert (rows[4].event, rows[4].kind, rows[4].step) == ("rollback", "", 25)
    assert (
        rows[4].note
        == f"base rose; back to {good(20)}; skipped steps 21 to 25; learning rate factor 0.5; restored {{}}"
    )
    assert (rows[9].event, rows[9].note) == ("quarantined", "shard data/x.tar")
    assert math.isnan(rows[10].probes["base"].loss)
    assert (rows[11].step, rows[11].bytes, rows[11].probes) == (None, None, {})
    assert rows[11].note.startswith("no proper event of its kind: field phase: ")
    assert rows[12].note == good(10)
    assert rows[13].note == "base gpt2 (float32, sha256 c0ffeec0ffee…), ranks 2, seed 7"


@pytest.mark.parametrize("width", [40, 200])
def test_the_printed_log(run: Path, width: int) -> None:
    ledger = Ledger(run / "ledger")
    add(ledger.journal, "probe", phase="[red]imdb\x1b[2J", sets={"bad": reading(3.5, 3.4)})
    add(ledger.journal, "quarantine", reason="one\ntwo\r")
    lines, newest = printed(run, width=width), ledger.newest("commit")
    commit = next(number for number, line in enumerate(lines) if "commit entry" in line)
    assert newest is not None and lines[commit].startswith("#8  20")
    for words in ("wiki step 50", " kB  ", newest.sha256[:12]):
        assert words in lines[commit]
    assert lines[commit + 1] == f"    {COMMIT}"
    assert lines.count("    base 3.050 (-0.350 / 0.03)") == 1, "of the good entry and its commit"
    assert any("[red]imdb?[2J step 0  probe" in line for line in lines), "a journal can't steer the terminal"
    assert "    bad 3.500 (+0.100 / 0.03)" in lines and any("one?two?" in line for line in lines)
    assert lines[-2].startswith("8 entries kept") and lines[-2].endswith(f"newest {COMMIT}; newest commit {COMMIT}")
    assert lines[-1] == f"head of the journal: {ledger.journal.head}"


def test_which_events_are_shown_and_which_rises_are_red(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "ledger/journal.jsonl")
    for step in range(99):
        add(journal, "probe", step=step, sets=SETS)
    for rise, guarded in ((0.01, True), (0.5, True), (math.nan, True), (0.5, False)):
        add(journal, "probe", sets={"red": reading(rise=rise, guarded=guarded)})
    lines = printed(tmp_path, force_terminal=True, color_system="standard")
    assert ["\x1b[31m(" in line for line in lines if " red 3" in line] == [False, True, True, False]
    shown = [line for line in printed(tmp_path) if line.startswith("#")]
    assert len(shown) == 100 and shown[0].startswith("#3 ")
    assert "3 earlier events are not shown: --all" in printed(tmp_path)
    text = io.StringIO()
    print_log(tmp_path, Console(file=text, width=200), None)
    assert text.getvalue().startswith("#0 ") and "earlier" not in text.getvalue()


def test_what_no_longer_counts_says_so(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")

    def record(step: int, value: float) -> None:
        ledger.record("good", 0, "a", step, {"w": torch.full((4,), value)}, {})

    for step in (1, 2, 3):
        record(step, step)
    ledger.prune_good(2)
    noted = len(ledger.journal.records())
    add(ledger.journal, "probe", step=4)
    record(4, 4)
    ledger.prune_good(2)
    ledger.resume(noted, **RESUME | {"snapshot": "step3.safetensors", "changed": {"monitoring.every": [4, 2]}})
    record(4, 5)
    record(4, 5)
    rows = log_rows(tmp_path)
    states = ["pruned", "pruned", "kept", "", "undone", "superseded", "", "", "recorded again", "kept"]
    assert [row.state for row in rows] == states
    for words in ("on from snapshot step3.safetensors", "every now 2", "good_step000000004.safetensors", "from #4"):
        assert words in rows[7].note
    lines = printed(tmp_path)
    assert any(line.startswith("#5 ") and line.endswith("  superseded") for line in lines)
    assert lines[-2].startswith("2 entries kept")


def test_what_was_made_says_how(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    made: dict[str, dict[str, Any]] = {
        "revert of a, forced: base rose": {"operation": "revert", "phase": "a", "forced": "base rose"},
        "revert of a by bypassing the sidecars after blocks 3, 7": {"phase": "a", "method": "bypass", "layers": [3, 7]},
        "merge of 111111111111…, 222222222222… with weights 1, 2": {"parents": ["1" * 64, "2" * 64], "weights": [1, 2]},
        "import of 333333333333…": {"sha256": "3" * 64, "made_by": None},
    }
    for index, (words, how) in enumerate(made.items()):
        how = {"operation": words.split()[0], **how}
        ledger.record("commit", index, "x", 0, {"w": torch.zeros(1)}, {}, made_by=how)
    notes = [f"{index:03d}_x_commit.safetensors, {words}" for index, words in enumerate(made)]
    assert [row.note for row in log_rows(tmp_path)] == notes


# Folders and files that lie: each is refused in one line, nothing is run, nothing is written.

READERS = {
    "log": lambda run, new: ("log", run),
    "show": lambda run, new: ("show", run),
    "diff": lambda run, new: ("diff", f"{run}@start", run),
    "restore": lambda run, new: ("restore", run, "--as-new-run", new),
    "prune": lambda run, new: ("prune", run, "--keep", "1"),
}
OPENERS = ("show", "diff", "restore")


def edit(run: Path) -> None:
    journal = run / "ledger/journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"window":[21,25]', b'"window":[21,24]'))


def name_elsewhere(run: Path) -> None:
    told = {"kind": "commit", "phase": "wiki", "phase_index": 0, "step": 50, "file": "../../secret.safetensors"}
    add_line(Journal(run / "ledger/journal.jsonl"), "entry", **told, sha256=sha256_of(b"mine"), bytes=4)


def vouch_for_another(run: Path) -> None:
    """By somebody who can write to the journal as well."""
    (file := run / "ledger" / COMMIT).write_bytes(b"no patch")
    told = {"kind": "commit", "phase": "wiki", "phase_index": 0, "step": 50, "file": file.name}
    Journal(run / "ledger/journal.jsonl").append("entry", **told, sha256=sha256_of(b"no patch"), bytes=8)


def put_another(run: Path) -> None:
    (run / "ledger" / COMMIT).write_bytes((run / "ledger" / START).read_bytes())


NOT_RECORDED = f"{COMMIT} is not the file that was recorded.*has not been opened"
LIES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "a line edited": (edit, tuple(READERS), "line 6 names the line before it by sha256 .*backup"),
    "a name that leads out": (name_elsewhere, OPENERS, "line 10 .*'../../secret.safetensors' can't be used"),
    "a bit flipped": (lambda run: flip(run / "ledger" / COMMIT), OPENERS, NOT_RECORDED),
    "another patch in its place": (put_another, OPENERS, NOT_RECORDED),
    "vouched for": (vouch_for_another, OPENERS, f"{COMMIT} is truncated or damaged, or no safetensors file"),
    "no run": (lambda run: run.rename(run.with_name("moved")), tuple(READERS), "a run .b. :bug:"),
}


@pytest.mark.parametrize("case", LIES)
def test_what_lies_is_refused_in_one_line(run: Path, ledger: Call, case: str) -> None:
    lie, commands, words = LIES[case]
    lie(run)
    before, new = contents(run.parent), run.parent / "new"
    for command in commands:
        result = ledger(*READERS[command](run, new))
        assert (result.code, result.out) == (2, ""), result
        assert result.err.count("\n") == 1 and re.match(f"revpatch: .*{words}", result.err), result
        assert contents(run.parent) == before and not new.exists()
    assert ledger("verify", run).code == (0 if "vouched" in case else 1)


def test_a_journal_that_was_emptied_or_cut(run: Path, ledger: Call, revpatch: Call) -> None:
    """The chain alone can't show a lost end; the files that nothing vouches for any more can. Of a run that was killed
    at its start, or that was lost, no command takes an empty journal for a history."""
    journal = run / "ledger/journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    result = ledger("show", run / "ledger" / COMMIT)
    assert result.code == 2 and f"'{COMMIT}' is not in" in result.err
    journal.write_bytes(b"")
    for result in (ledger("log", run), ledger("log", run, "--json"), revpatch("report", run)):
        one_line(result, "ledger/journal.jsonl is empty", "first step", "backup")
    verdict = ledger("verify", run)
    assert verdict.code == 1 and "is empty" in verdict.out


def test_names_that_lead_out_are_not_removed(run: Path, ledger: Call) -> None:
    secret = run.parent / "secret.safetensors"
    secret.write_bytes(b"mine")
    journal, names = Journal(run / "ledger/journal.jsonl"), ["../../secret.safetensors", str(secret)]
    add(journal, "resume", undoes_from=9, superseded=names)
    journal.append("pruned", files=names, leftovers=names, bytes=0)
    assert ledger("prune", run, "--keep", "1").code == 0
    assert secret.read_bytes() == b"mine"


LOST = {
    "{} | head -1; exit ${{PIPESTATUS[0]}}": (0, ""),
    "{} > /dev/full": (2, "revpatch: standard output: No space left on device: what the command printed is not whole"),
    "{} >&- 2>&- <&-": (0, ""),
    "PYTHONIOENCODING=ascii {} | tail -1": (0, ""),
}
"""What becomes of the output of a command, as bash writes it; the exit code, and what standard error begins with."""


@pytest.mark.parametrize("way", LOST)
def test_what_is_printed_may_get_lost(tmp_path: Path, way: str) -> None:
    journal, lines = Journal(tmp_path / "ledger/journal.jsonl"), []
    journal._write = lines.append  # type: ignore[method-assign]
    for step in range(1000):  # more than a pipe holds
        add(journal, "probe", phase="wikí \u2026", step=step)
    journal.path.write_bytes(b"".join(lines))
    command = way.format(f"{sys.executable} -m revpatch ledger log --all '{tmp_path}'")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    code, words = LOST[way]
    assert done.returncode == code and done.stderr.startswith(words), done
    assert done.stderr.count("\n") == bool(words)
    if "head -1" in way:
        assert done.stdout.startswith("#0 ") and done.stdout.count("\n") == 1


def test_log_verify_and_prune_do_without_torch(run: Path) -> None:
    a_snapshot(run)
    code = (
        "import sys; from revpatch.cli import app\n"
        "for command in (['log'], ['log', '--json'], ['verify'], ['prune', '--keep', '1']):\n"
        "    sys.argv = ['revpatch', 'ledger', command[0], sys.argv[-1], *command[1:]]\n"
        "    app(sys.argv[1:], standalone_mode=False)\n"
        "    sys.argv = sys.argv[:1] + [sys.argv[3]]\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'pyarrow'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in ("head of the journal", '"events": [', "the chain holds", good(10)))
