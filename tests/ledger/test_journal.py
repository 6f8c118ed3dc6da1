"""The journal: nothing in it can be changed unseen, and no crash loses what was recorded."""

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from past_events import add, reading

from revpatch.durable import sha256_of, to_plain
from revpatch.ledger.events import RolledBack
from revpatch.ledger.journal import GENESIS, Journal, JournalError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger" / "journal.jsonl"


def a_journal(path, events: int = 5) -> Journal:
    journal = Journal(path)
    for step in range(events):
        add(journal, "probe", step=step, sets={"base": reading(3.5)})
    return journal


@pytest.fixture(scope="module")
def four_lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    a_journal(path, 4)
    return path.read_bytes()


def test_what_is_appended_is_read(path):
    journal = a_journal(path)
    returned = add(journal, "rollback", reason="naïve ☃\nline", window=[400, 500], new_lr_factor=math.nan)
    assert isinstance(returned, RolledBack) and (returned.window, returned.reason) == ([400, 500], "naïve ☃\nline")
    assert math.isnan(returned.new_lr_factor) and journal.records()[-1]["new_lr_factor"] == "NaN"
    assert abs(datetime.fromisoformat(returned.time) - datetime.now(timezone.utc)) < timedelta(minutes=1)
    again = Journal(path, readonly=True)
    assert again.records() == journal.records()
    assert [record["seq"] for record in again.records()] == list(range(6))
    assert again.records()[-1] == to_plain(returned.as_record())
    assert again.warnings == []


def test_each_line_carries_the_sha256_of_the_one_before(path):
    head = a_journal(path).head
    lines = path.read_bytes().splitlines()
    assert [json.loads(line)["previous"] for line in lines] == [GENESIS, *map(sha256_of, lines[:-1])]
    assert head == Journal(path).head == sha256_of(lines[-1])


def test_an_empty_journal_has_the_genesis_as_its_head(path):
    assert Journal(path).head == GENESIS
    assert path.read_bytes() == b""


def test_going_on_after_reopening(path):
    a_journal(path, 3)
    add(Journal(path), "interrupted")
    assert [record["event"] for record in Journal(path).records()] == ["probe"] * 3 + ["interrupted"]


def test_reading_changes_nothing(path):
    a_journal(path)
    path.write_bytes(path.read_bytes() + b'{"seq":')
    before = path.read_bytes()
    journal = Journal(path, readonly=True)
    assert journal.torn == b'{"seq":'
    assert len(journal.records()) == 5
    with pytest.raises(JournalError, match="reading only"):
        add(journal, "probe")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_reading_a_journal_that_is_not_there(path):
    with pytest.raises(JournalError, match="is not there"):
        Journal(path, readonly=True)
    assert not path.parent.exists()


@pytest.mark.parametrize("tail", [b'{"seq":5,"time":"2025', b"\0\0\0\0", b'{"seq":5}', b"\xff"])
def test_a_torn_last_line_is_set_aside_and_recorded(path, tail):
    a_journal(path)
    for number in (1, 2):
        path.write_bytes(path.read_bytes() + tail)
        journal = Journal(path)
        aside = path.with_name(f"journal.jsonl.torn-{number}")
        assert aside.read_bytes() == tail
        assert aside.name in journal.warnings[0]
        last = journal.records()[-1]
        assert (last["event"], last["file"], last["bytes"]) == ("torn", aside.name, len(tail))
    add(journal, "interrupted")
    assert [r["event"] for r in Journal(path).records()] == ["probe"] * 5 + ["torn"] * 2 + ["interrupted"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_of_the_file_keeps_every_whole_line(path, four_lines, data):
    path.parent.mkdir(exist_ok=True)
    whole = four_lines
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    assert len(Journal(path, readonly=True).records()) == whole[:cut].count(b"\n")
    journal = Journal(path)
    assert bool(journal.warnings) == (cut > 0 and whole[cut - 1 : cut] != b"\n")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_before_the_last_line_is_seen(path, four_lines, data):
    path.parent.mkdir(exist_ok=True)
    whole = bytearray(four_lines)
    position = data.draw(st.integers(0, whole.rindex(b"\n", 0, -1)))
    whole[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    number = whole[:position].count(b"\n") + 1
    with pytest.raises(JournalError, match=rf"line ({number}|{number + 1}) "):
        Journal(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 2),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], 4),
        (lambda lines: [*lines[:2], b"", *lines[2:]], 3),
        (lambda lines: [*lines[:2], lines[2][:20], *lines[3:]], 3),
        (lambda lines: [*lines[:2], b"[]", *lines[3:]], 3),
        (lambda lines: [*lines[:2], b'{"seq":2}', *lines[3:]], 3),
        (lambda lines: [*lines[:2], b"[" * 100_000, *lines[3:]], 3),
        (lambda lines: [*lines[:2], lines[2].replace(b"3.5", b"3.4"), *lines[3:]], 4),
    ],
    ids=["removed", "first-removed", "swapped", "doubled", "blank", "torn", "list", "incomplete", "nested", "edited"],
)
def test_a_changed_history_is_refused_by_line(path, change, line):
    a_journal(path)
    path.write_bytes(b"\n".join([*change(path.read_bytes().splitlines()), b""]))
    for readonly in (True, False):
        with pytest.raises(JournalError, match=rf"journal\.jsonl line {line} .*backup"):
            Journal(path, readonly)


def test_a_head_noted_earlier_shows_what_the_chain_cannot(path):
    journal = a_journal(path, 2)
    early = journal.head
    add(journal, "commit", step=1)
    late = journal.head
    assert Journal(path).holds(early)
    assert Journal(path).holds(late)
    assert Journal(path).holds(GENESIS)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert Journal(path).holds(early)
    assert not Journal(path).holds(late)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq": 1}, "'seq' is the journal's own"),
        ({"previous": ""}, "'previous' is the journal's own"),
        ({"facts": {"base": {"dtype": object()}}}, r"event 'run'\.facts\.base\.dtype is a object"),
    ],
)
def test_fields_that_cannot_be_recorded(path, fields, message):
    journal = a_journal(path)
    before = path.read_bytes()
    with pytest.raises(JournalError, match=message):
        add(journal, "run", **fields)
    assert path.read_bytes() == before


def test_two_writers_are_told_apart(path):
    one, other = a_journal(path), Journal(path)
    add(one, "probe")
    with pytest.raises(JournalError, match="another process writes to this run"):
        add(other, "probe")
    assert len(Journal(path).records()) == 6


def test_a_full_disk_cuts_back_to_whole_lines_and_writing_can_go_on(path):
    code = (
        "import sys; from pathlib import Path; from revpatch.ledger.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1])); journal.append('interrupted', phase='a', step=1)\n"
        "try: journal.append('interrupted', phase='x' * 5000, step=1)\n"
        "except OSError as error: print(error.filename)\n"
        "journal.append('pruned', files=[], bytes=0)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )
    assert (process.returncode, process.stdout.strip()) == (0, str(path)), process.stderr
    assert [record["event"] for record in Journal(path, readonly=True).records()] == ["interrupted", "pruned"]


def test_what_did_not_reach_the_disk_is_not_acknowledged(path, monkeypatch):
    def failing(_):
        raise OSError(errno.EIO, "the disk is broken")

    journal = a_journal(path)
    before = path.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="the disk is broken"):
            add(journal, "commit")
    assert path.read_bytes() == before
    add(journal, "commit")
    assert [record["seq"] for record in Journal(path).records()] == list(range(6))


def test_a_line_that_was_chained_with_a_wrong_number_is_refused(path):
    journal = a_journal(path, 2)
    forged = {"seq": 7, "time": "", "event": "commit", "previous": journal.head}
    with path.open("a") as file:
        file.write(json.dumps(forged) + "\n")
    with pytest.raises(JournalError, match=r"line 3 has seq 7, expected 2"):
        Journal(path)


def test_killed_while_writing_everything_acknowledged_is_there(path):
    code = (
        "import sys; from pathlib import Path; from revpatch.ledger.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "while True: print(journal.append('interrupted', phase='x' * 3000, step=1).seq, flush=True)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "0\n"
    time.sleep(0.2)
    writer.send_signal(signal.SIGKILL)
    acknowledged = [0, *map(int, writer.stdout.read().splitlines())]
    writer.wait()
    assert [r["seq"] for r in Journal(path).records()][: len(acknowledged)] == acknowledged
