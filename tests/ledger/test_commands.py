"""`revpatch ledger ...` as a person meets it, on a folder whose base model is nowhere; and on folders that lie."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from command import Call, one_line
from past_events import add, add_line
from past_run import BASE, SIDECAR, a_trained_run, metadata, tensors

from revpatch.config import SidecarConfig
from revpatch.durable import sha256_of
from revpatch.ledger.journal import Journal
from revpatch.ledger.ledger import Ledger
from revpatch.ledger.patch_file import write_entry


@pytest.fixture
def ledger(revpatch: Call) -> Call:
    """ledger(*arguments): `revpatch ledger ...`, in this process."""
    return partial(revpatch, "ledger")


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("past") / "run"
    a_trained_run(run)
    return run


@pytest.fixture
def run(past: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(past, tmp_path / "a run [b] :bug:"))


def test_the_history_as_text_and_as_json(run: Path, ledger: Call) -> None:
    text = ledger("log", run)
    assert (text.code, text.err) == (0, "")
    for words in ("wiki step 25  rollback", "base rose; back to 000_wiki_good_step000000020.safetensors", "base 3.050"):
        assert words in text.out
    told = ledger("log", run, "--json").json()
    records = Ledger(run / "ledger", readonly=True).journal
    assert told["head"] == records.head
    assert [{k: v for k, v in event.items() if k != "state"} for event in told["events"]] == records.records()
    assert [event["state"] for event in told["events"] if event["event"] == "entry"] == ["kept"] * 8


def test_verify_as_text_and_as_json(run: Path, ledger: Call) -> None:
    told = ledger("verify", run, "--json").json()
    assert told["ok"] and told["entries"] == 8 and told["hashed"] and told["problems"] == []
    assert ledger("verify", run, "--head", told["head"]).code == 0
    assert not ledger("verify", run, "--no-hash", "--json").json()["hashed"]
    wrong = ledger("verify", run, "--head", "0" * 64)
    assert wrong.code == 1 and "0" * 64 in wrong.out
    wrong = ledger("verify", run, "--head", "0" * 64, "--json")
    assert wrong.code == 1 and json.loads(wrong.out)["problems"][0]["where"] == "journal.jsonl"


def test_show_and_diff_as_text_and_as_json(run: Path, ledger: Call) -> None:
    assert "000_wiki_commit.safetensors in " in ledger("show", run).out
    shown = ledger("show", f"{run}@good~1", "--json").json()
    assert shown["recorded"]["step"] == 40 and len(shown["layers"]) == 2
    assert "cosine" in ledger("diff", f"{run}@start", run).out
    told = ledger("diff", f"{run}@start", run, "--json").json()
    assert told["probes"]["base"]["loss"] == [3.0, 3.05] and len(told["layers"]) == 2


def test_a_patch_with_nan_is_still_json(tmp_path: Path, ledger: Call) -> None:
    broken = tensors(1)
    broken["00.coupling.f.up.bias"][0] = float("nan")
    write_entry(tmp_path / "a.safetensors", broken, metadata("rollback", 5))
    assert ledger("show", tmp_path / "a.safetensors", "--json").json()["layers"][0]["norm"] == "NaN"
    assert (
        ledger("diff", tmp_path / "a.safetensors", tmp_path / "a.safetensors", "--json").json()["layers"][0]["distance"]
        == "NaN"
    )
    assert "nan" in ledger("show", tmp_path / "a.safetensors").out


def test_restore_and_prune_as_text_and_as_json(run: Path, tmp_path: Path, ledger: Call) -> None:
    text = ledger("restore", run, "--as-new-run", tmp_path / "new")
    assert text.code == 0 and f"--set output_dir={tmp_path / 'new'}" in text.out
    told = ledger("restore", f"{run}@good~4", "--as-new-run", tmp_path / "other", "--json").json()
    assert told["name"] == "000_wiki_origin.safetensors" and told["source"]["step"] == 10
    dry = ledger("prune", run, "--keep", "3", "--dry-run")
    assert "would remove 000_wiki_good_step000000010.safetensors" in dry.out
    assert "kept 000_wiki_good_step000000020.safetensors: the rollback of journal line 5" in dry.out
    told = ledger("prune", run, "--keep", "3", "--json").json()
    assert told["entries"] == ["000_wiki_good_step000000010.safetensors"] and told["bytes"] > 0
    assert "0 entries and 0 files" in ledger("prune", run, "--keep", "3").out
    assert ledger("verify", run).code == 0


# Folders and files that lie: each is refused in one line, nothing is run, nothing is written.

READERS = {
    "log": lambda run, new: ("log", run),
    "show": lambda run, new: ("show", run),
    "diff": lambda run, new: ("diff", f"{run}@start", run),
    "restore": lambda run, new: ("restore", run, "--as-new-run", new),
    "prune": lambda run, new: ("prune", run, "--keep", "1"),
}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def refused(ledger: Call, run: Path, command: str, *words: str) -> None:
    """One line, exit code 2, and everything as it was."""
    before, new = contents(run.parent), run.parent / "new"
    result = ledger(*READERS[command](run, new))
    assert (result.code, result.out) == (2, ""), result
    assert result.err.startswith("revpatch: ") and result.err.count("\n") == 1
    assert [word for word in words if word not in result.err] == []
    assert contents(run.parent) == before and not new.exists()


def edited(lines: list[bytes]) -> list[bytes]:
    return [*lines[:3], lines[3].replace(b'"step":25', b'"step":24'), *lines[4:]]


JOURNALS: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "a line edited": (edited, "line 5 names the line before it"),
    "a line removed": (lambda lines: lines[:3] + lines[4:], "line 4 has seq 4, expected 3"),
    "two lines exchanged": (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], "line 4 has seq 4, expected 3"),
    "its beginning cut off": (lambda lines: lines[2:], "line 1 has seq 2, expected 0"),
    "another run's line": (lambda lines: [*lines, lines[-1]], "line 10 has seq 8, expected 9"),
    "no JSON": (lambda lines: [*lines[:3], b"\xff\xfe{", *lines[4:]], "line 4 is not an event"),
}


@pytest.mark.parametrize("what", JOURNALS)
def test_a_journal_that_was_cut_reordered_or_edited(run: Path, ledger: Call, what: str) -> None:
    journal = run / "ledger/journal.jsonl"
    change, message = JOURNALS[what]
    journal.write_bytes(b"".join(line + b"\n" for line in change(journal.read_bytes().split(b"\n")[:-1])))
    for command in READERS:
        refused(ledger, run, command, message, "backup")
    verdict = ledger("verify", run)
    assert verdict.code == 1 and message in verdict.out


def test_an_empty_journal(tmp_path: Path, ledger: Call, revpatch: Call) -> None:
    """Of a run that was killed at its start, or that was lost: no command takes it for a history."""
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger/journal.jsonl").write_bytes(b"")
    for result in (ledger("log", tmp_path), ledger("log", tmp_path, "--json"), revpatch("report", tmp_path)):
        one_line(result, f"{tmp_path}/ledger/journal.jsonl is empty", "first step", "backup")
    verdict = ledger("verify", tmp_path)
    assert verdict.code == 1 and "is empty" in verdict.out


def test_lines_missing_at_the_end(run: Path, ledger: Call) -> None:
    """The chain alone can't show it; the files that nothing vouches for any more can, and a head that was noted."""
    journal = run / "ledger/journal.jsonl"
    head = Ledger(run / "ledger", readonly=True).journal.head
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    verdict = ledger("verify", run, "--head", head)
    assert verdict.code == 1
    assert "000_wiki_commit.safetensors: is in no journal line" in verdict.out and head in verdict.out
    result = ledger("show", run / "ledger/000_wiki_commit.safetensors")
    assert result.code == 2 and "'000_wiki_commit.safetensors' is not in" in result.err


@pytest.mark.parametrize("how", ["a bit flipped", "cut", "another patch in its place"])
def test_a_file_that_was_tampered_with(run: Path, ledger: Call, how: str) -> None:
    file = run / "ledger/000_wiki_commit.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "another patch in its place":
        data = bytearray((run / "ledger/000_wiki_start.safetensors").read_bytes())
    file.write_bytes(data[:-7] if how == "cut" else data)
    for command in ("show", "diff", "restore"):
        refused(
            ledger,
            run,
            command,
            "000_wiki_commit.safetensors",
            "is not the file that was recorded",
            "has not been opened",
        )
    verdict = ledger("verify", run)
    assert verdict.code == 1 and verdict.out.count("000_wiki_commit.safetensors") == 1


class Evil:
    """Leaves a file behind when it is unpickled by anything that runs code."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("vouched", [False, True], ids=["put in its place", "its sha256 in the journal"])
@pytest.mark.parametrize("bare", [False, True], ids=["torch.save", "bare pickle"])
def test_a_pickle_with_code_in_it(tmp_path: Path, ledger: Call, vouched: bool, bare: bool) -> None:
    run, trace = tmp_path / "run", tmp_path / "trace"
    a_trained_run(run)
    file = run / "ledger/000_wiki_commit.safetensors"
    evil = {"header": Evil(trace), "tensors": {"w": Evil(trace)}}
    if bare:
        file.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, file)
    if vouched:  # by somebody who can write to the journal as well
        journal = Journal(run / "ledger/journal.jsonl")
        told = {"kind": "commit", "phase": "wiki", "phase_index": 0, "step": 50, "file": file.name}
        journal.append("entry", **told, sha256=sha256_of(file.read_bytes()), bytes=file.stat().st_size)
    for command in ("show", "diff", "restore"):
        refused(ledger, run, command, *(["truncated or damaged"] if vouched else ["has not been opened"]))
    alone = tmp_path / "alone.safetensors"
    shutil.copy(file, alone)
    result = ledger("show", alone)
    assert result.code == 2 and "truncated or damaged" in result.err
    ledger("log", run), ledger("verify", run), ledger("prune", run, "--keep", "1")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "a/../b.safetensors"])
def test_a_name_that_leads_out_of_the_ledger(run: Path, ledger: Call, name: str) -> None:
    (run.parent / "secret.safetensors").write_bytes(b"mine")
    for reference in (f"{run}@{name}", f"{run}@{Path(name).with_suffix('')}"):
        result = ledger("show", reference)
        assert result.code == 2 and "without '/' and '..'" in result.err
    told = {"kind": "commit", "phase": "wiki", "phase_index": 0, "step": 50, "file": name}
    add_line(Journal(run / "ledger/journal.jsonl"), "entry", **told, sha256=sha256_of(b"mine"), bytes=4)
    for command in ("show", "diff", "restore", "prune"):
        refused(ledger, run, command, "line 10", repr(name), "can't be used")
    verdict = ledger("verify", run)
    assert verdict.code == 1 and "can't be used" in verdict.out


def test_names_that_lead_out_are_not_removed(run: Path, ledger: Call) -> None:
    secret = run.parent / "secret.safetensors"
    secret.write_bytes(b"mine")
    journal = Journal(run / "ledger/journal.jsonl")
    names = ["../../secret.safetensors", str(secret)]
    add(journal, "resume", undoes_from=9, superseded=names)
    journal.append("pruned", files=names, leftovers=names, bytes=0)
    assert ledger("prune", run, "--keep", "1").code == 0
    assert secret.read_bytes() == b"mine"


STRANGERS = {
    "of another family": ({"base": {**BASE, "family": "llama"}}, SIDECAR, "is a patch of a gpt2 model"),
    "of another base": ({"base": {**BASE, "sha256": "c" * 64}}, SIDECAR, "are patches of two bases"),
    "of another shape": ({}, SidecarConfig(bottleneck=2), "are of two shapes: sidecar.bottleneck = 4 and 2"),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_a_patch_that_does_not_belong(run: Path, tmp_path: Path, ledger: Call, what: str) -> None:
    changes, sidecar, message = STRANGERS[what]
    told = metadata("commit", 5, sidecar=sidecar.model_dump(mode="json"), **changes)
    write_entry(tmp_path / "other.safetensors", tensors(1, sidecar), told)
    result = ledger("diff", run, tmp_path / "other.safetensors")
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1


def test_where_there_is_nothing(tmp_path: Path, ledger: Call) -> None:
    for command in READERS:
        result = ledger(*READERS[command](tmp_path / "none", tmp_path / "new"))
        assert result.code == 2 and str(tmp_path / "none") in result.err, result
    assert ledger("verify", tmp_path / "none").code == 1
    assert list(tmp_path.iterdir()) == []


LOST = {
    "{} | head -1; exit ${{PIPESTATUS[0]}}": (0, ""),
    "{} --json | head -c 10; exit ${{PIPESTATUS[0]}}": (0, ""),
    "{} > /dev/full": (2, "revpatch: standard output: No space left on device: what the command printed is not whole"),
    "{} > /dev/full 2>&1": (2, ""),
    "{} >&-": (0, ""),
    "{} >&- 2>&- <&-": (0, ""),
    "{} --nonsense 2>&-": (2, ""),
    "PYTHONIOENCODING=ascii {} | tail -1": (0, ""),
    "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {} > /dev/null": (0, ""),
}
"""What becomes of the output of a command, as bash writes it; the exit code, and what standard error begins with."""


@pytest.mark.parametrize("way", LOST)
def test_what_is_printed_may_get_lost(tmp_path: Path, way: str) -> None:
    journal = Journal(tmp_path / "ledger/journal.jsonl")
    lines: list[bytes] = []
    journal._write = lines.append  # type: ignore[method-assign, assignment]
    for step in range(2000):  # more than a pipe holds
        add(journal, "probe", phase="wikí \u2026", step=step)
    journal.path.write_bytes(b"".join(lines))
    command = way.format(f"{sys.executable} -m revpatch ledger log --all '{tmp_path}'")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    code, words = LOST[way]
    assert done.returncode == code and done.stderr.startswith(words), done
    assert done.stderr.count("\n") == bool(words)
    if "head -1" in way:
        assert done.stdout.startswith("#0 ") and done.stdout.count("\n") == 1
