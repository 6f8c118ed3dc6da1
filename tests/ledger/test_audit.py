"""Is a ledger whole: everything that is wrong is named, and what is right is not."""

import io
from pathlib import Path

import torch
from past_events import add
from past_run import a_patch, a_run
from rich.console import Console

from revpatch.ledger.maintenance import print_verdict, verify
from revpatch.ledger.patch_file import serialise, write_entry


def test_verify_names_everything_that_is_wrong(tmp_path):
    run, ledger = a_run(tmp_path)
    directory = run / "ledger"
    whole = verify(run)
    assert (whole.ok, whole.entries, whole.events, whole.head) == (True, 9, 11, ledger.journal.head)
    assert whole.bytes_hashed == sum(path.stat().st_size for path in directory.glob("*.safetensors"))

    (directory / "000_wikitext_start.safetensors").unlink()
    flipped = directory / "000_wikitext_commit.safetensors"
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    cut = directory / "001_imdb_start.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    write_entry(directory / "002_new_start.safetensors", a_patch(), {})
    journal = directory / "journal.jsonl"
    lines = journal.read_bytes().splitlines()
    lines[7] = lines[7].replace(b"0.1 nats", b"0.0 nats")
    journal.write_bytes(b"\n".join([*lines, b'{"seq":11']))
    problems = {(problem.where, " ".join(problem.what.split(" ")[:2])) for problem in verify(run).problems}
    assert problems == {
        ("journal.jsonl", "line 9"),
        ("journal.jsonl", "its last"),
        ("000_wikitext_start.safetensors", "is missing"),
        ("000_wikitext_commit.safetensors", "has sha256"),
        ("001_imdb_start.safetensors", f"has {cut.stat().st_size}"),
        ("002_new_start.safetensors", "is in"),
    }
    assert "line 9 names" in verify(run).problems[0].what
    assert all(problem.advice for problem in verify(run).problems)


def test_verify_against_a_head_noted_earlier(tmp_path):
    run, ledger = a_run(tmp_path)
    noted = ledger.journal.head
    add(ledger.journal, "interrupted")
    assert verify(run, noted).ok
    journal = run / "ledger" / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-2]))
    (run / "ledger" / "001_imdb_good_step000000100.safetensors").unlink()
    assert verify(run).ok, "the chain alone can't show it"
    (problem,) = verify(run, noted).problems
    assert noted in problem.what


def test_verify_where_there_is_no_ledger(tmp_path):
    (problem,) = verify(tmp_path).problems
    assert "is not there" in problem.what
    assert not (tmp_path / "ledger").exists()


def test_the_printed_verdict(tmp_path):
    run, _ = a_run(tmp_path)
    text = io.StringIO()
    print_verdict(verify(run), Console(file=text, width=200))
    assert "✓ the chain holds and every file is as recorded: 11 events, 9 entries" in text.getvalue()
    (run / "ledger" / "000_wikitext_commit.safetensors").unlink()
    text = io.StringIO()
    print_verdict(verify(run), Console(file=text, width=200))
    assert "✓" not in text.getvalue()
    assert "000_wikitext_commit.safetensors: is missing (journal line 9)" in text.getvalue()
    assert "backup" in text.getvalue()


def test_without_hashing_only_what_is_missing_or_cut_is_seen(tmp_path):
    run, _ = a_run(tmp_path)
    flipped = run / "ledger/000_wikitext_commit.safetensors"
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    report = verify(run, hash_files=False)
    assert report.ok and report.bytes_hashed == 0 and not report.hashed
    assert not verify(run).ok
    text = io.StringIO()
    print_verdict(report, Console(file=text, width=200))
    assert "every file is there, with its size" in text.getvalue() and "no file hashed" in text.getvalue()
    flipped.write_bytes(data[:-1])
    (problem,) = verify(run, hash_files=False).problems
    assert problem.where == flipped.name


def snapshot(run: Path, events: int, head: str) -> Path:
    """What a snapshot says of the journal."""
    (run / "snapshot").mkdir(exist_ok=True)
    path = run / "snapshot/step000000000300.safetensors"
    path.write_bytes(serialise({"w": torch.zeros(2)}, {"snapshot": 1, "events": events, "head": head}))
    return path


def test_a_journal_that_was_cut_is_seen_by_what_a_snapshot_noted(tmp_path):
    run, ledger = a_run(tmp_path)
    path = snapshot(run, 11, ledger.journal.head)
    assert verify(run).ok
    journal = run / "ledger/journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    (run / "ledger/001_imdb_good_step000000100.safetensors").unlink()
    (problem,) = verify(run).problems
    assert problem.where == "journal.jsonl" and f"snapshot/{path.name} noted line 11" in problem.what
    journal.write_bytes(whole)
    path.write_bytes(path.read_bytes()[:100])
    assert "is no whole snapshot" in next(p.what for p in verify(run).problems if p.where.startswith("snapshot/"))
