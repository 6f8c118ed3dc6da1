"""The journal: no change of it is unseen, no crash loses what was recorded, and each kind of event has its fields."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from full_disk import full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from past_events import KNOWN, add, add_line, reading

from revpatch.durable import sha256_of, to_plain
from revpatch.ledger.events import KINDS, Event, ProbeReading, RolledBack, UnknownEvent
from revpatch.ledger.journal import EVENT_FIELDS, GENESIS, Journal, JournalError
from revpatch.ledger.ledger import Ledger
from revpatch.ledger.maintenance import verify

RUNS = Path(__file__).parents[2] / "docs/RUNS.md"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger/journal.jsonl"


def a_journal(path: Path, events: int = 5) -> Journal:
    journal = Journal(path)
    for step in range(events):
        add(journal, "probe", step=step, sets={"base": reading(3.5)})
    return journal


@pytest.fixture(scope="module")
def four_lines(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return a_journal(tmp_path_factory.mktemp("journal") / "journal.jsonl", 4).path.read_bytes()


def test_what_is_appended_is_read(path: Path) -> None:
    journal = Journal(path)
    assert (journal.head, path.read_bytes()) == (GENESIS, b"")
    journal = a_journal(path)
    sets = {"a": reading(low=-math.inf, block_losses=[1.0, math.inf])}
    more = {"window": [400, 500], "new_lr_factor": math.nan, "restored": sets}
    returned = add(journal, "rollback", reason="naïve ☃\nline", **more)
    assert isinstance(returned, RolledBack) and (returned.window, returned.reason) == ([400, 500], "naïve ☃\nline")
    assert math.isnan(returned.new_lr_factor) and journal.records()[-1]["new_lr_factor"] == "NaN"
    read = Journal(path).events(RolledBack)[0].restored["a"]
    assert read.block_losses == [1.0, math.inf] and read.low == -math.inf
    assert abs(datetime.fromisoformat(returned.time) - datetime.now(timezone.utc)) < timedelta(minutes=1)
    again = Journal(path, readonly=True)
    assert again.records() == journal.records() and again.warnings == []
    assert [record["seq"] for record in again.records()] == list(range(6))
    assert again.records()[-1] == to_plain(returned.as_record())
    lines = path.read_bytes().splitlines()
    assert [json.loads(line)["previous"] for line in lines] == [GENESIS, *map(sha256_of, lines[:-1])]
    assert journal.head == again.head == sha256_of(lines[-1])
    add(Journal(path), "interrupted")
    assert [record["event"] for record in Journal(path).records()] == ["probe"] * 5 + ["rollback", "interrupted"]


def test_reading_changes_nothing(path: Path) -> None:
    with pytest.raises(JournalError, match="is not there"):
        Journal(path, readonly=True)
    assert not path.parent.exists()
    a_journal(path)
    path.write_bytes(path.read_bytes() + b'{"seq":')
    before = path.read_bytes()
    journal = Journal(path, readonly=True)
    assert (journal.torn, len(journal.records())) == (b'{"seq":', 5)
    with pytest.raises(JournalError, match="reading only"):
        add(journal, "probe")
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("tail", [b'{"seq":5}', b"\xff"])
def test_a_torn_last_line_is_set_aside_and_recorded(path: Path, tail: bytes) -> None:
    a_journal(path)
    for number in (1, 2):
        path.write_bytes(path.read_bytes() + tail)
        journal = Journal(path)
        aside = path.with_name(f"journal.jsonl.torn-{number}")
        assert aside.read_bytes() == tail and aside.name in journal.warnings[0]
        last = journal.records()[-1]
        assert (last["event"], last["file"], last["bytes"]) == ("torn", aside.name, len(tail))
    add(journal, "interrupted")
    assert [r["event"] for r in Journal(path).records()] == ["probe"] * 5 + ["torn"] * 2 + ["interrupted"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_of_the_file_keeps_every_whole_line(path: Path, four_lines: bytes, data: st.DataObject) -> None:
    path.parent.mkdir(exist_ok=True)
    cut = data.draw(st.integers(0, len(four_lines)))
    path.write_bytes(four_lines[:cut])
    assert len(Journal(path, readonly=True).records()) == four_lines[:cut].count(b"\n")
    assert bool(Journal(path).warnings) == (cut > 0 and four_lines[cut - 1 : cut] != b"\n")


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_before_the_last_line_is_seen(path: Path, four_lines: bytes, data: st.DataObject) -> None:
    path.parent.mkdir(exist_ok=True)
    whole = bytearray(four_lines)
    position = data.draw(st.integers(0, whole.rindex(b"\n", 0, -1)))
    whole[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    number = whole[:position].count(b"\n") + 1
    with pytest.raises(JournalError, match=rf"line ({number}|{number + 1}) "):
        Journal(path)
    assert path.read_bytes() == whole


def _forged(lines: list[bytes]) -> list[bytes]:
    line = {"seq": 7, "time": "", "event": "commit", "previous": sha256_of(lines[-1])}
    return [*lines, json.dumps(line).encode()]


CHANGED: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "removed": (lambda lines: [lines[0], *lines[2:]], "line 2 has seq 2, expected 1"),
    "its beginning cut off": (lambda lines: lines[2:], "line 1 has seq 2, expected 0"),
    "exchanged": (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "line 2 has seq 2, expected 1"),
    "doubled": (lambda lines: [*lines, lines[-1]], "line 6 has seq 4, expected 5"),
    "a wrong number": (_forged, "line 6 has seq 7, expected 5"),
    "edited": (
        lambda lines: [*lines[:2], lines[2].replace(b"3.5", b"3.4"), *lines[3:]],
        "line 4 names the line before it by sha256 .*line 3 was edited",
    ),
    **{
        str(line[:12]): (lambda lines, line=line: [*lines[:2], line, *lines[3:]], "line 3 is not an event")
        for line in (b"", b"\xff\xfe{", b'{"seq":2,"time', b"[]", b'{"seq":2}', b"[" * 100_000)
    },
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_history_is_refused_by_line(path: Path, case: str) -> None:
    change, words = CHANGED[case]
    a_journal(path)
    path.write_bytes(b"\n".join([*change(path.read_bytes().splitlines()), b""]))
    for readonly in (True, False):
        with pytest.raises(JournalError, match=rf"journal\.jsonl {words}.*backup"):
            Journal(path, readonly)
    assert any(re.search(words, problem.what) for problem in verify(path.parent).problems)


def test_a_head_noted_earlier_shows_what_the_chain_cannot(path: Path) -> None:
    journal = a_journal(path, 2)
    early = journal.head
    add(journal, "commit", step=1)
    late = journal.head
    assert all(Journal(path).holds(head) for head in (early, late, GENESIS))
    assert [Journal(path).head_after(count) for count in (0, 2, 3, 4)] == [GENESIS, early, late, None]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert Journal(path).holds(early) and not Journal(path).holds(late)


def test_two_writers_are_told_apart(path: Path) -> None:
    one, other = a_journal(path), Journal(path)
    add(one, "probe")
    with pytest.raises(JournalError, match="another process writes to this run"):
        add(other, "probe")
    assert len(Journal(path).records()) == 6


def test_a_disk_that_fails_leaves_whole_lines_and_writing_can_go_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What did not reach the disk is not acknowledged."""

    def failing(_: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    journal = a_journal(path, 1)
    before = path.read_bytes()
    with full_disk(2000), pytest.raises(OSError, match=r"File too large.*journal\.jsonl"):
        add(journal, "interrupted", phase="x" * 5000)
    assert path.read_bytes() == before
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="the disk is broken"):
            add(journal, "commit")
    assert path.read_bytes() == before
    add(journal, "commit")
    assert [record["seq"] for record in Journal(path).records()] == [0, 1]


def test_killed_while_writing_everything_acknowledged_is_there(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from revpatch.ledger.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "while True: print(journal.append('interrupted', phase='x' * 3000, step=1).seq, flush=True)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(20)]
    writer.send_signal(signal.SIGKILL)
    acknowledged += map(int, writer.stdout.read().splitlines())
    writer.wait()
    assert [r["seq"] for r in Journal(path).records()][: len(acknowledged)] == acknowledged


# The kinds of events and their fields.


def own_fields(kind: type[Event]) -> list[str]:
    return [name for name in kind.model_fields if name not in EVENT_FIELDS]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_and_is_the_line_again(path: Path, kind: str) -> None:
    """And no field that is always there can be left out."""
    journal = Journal(path)
    needed = [name for name in own_fields(KINDS[kind]) if KINDS[kind].model_fields[name].is_required()]
    for name in needed:
        with pytest.raises(JournalError, match=rf"^event '{kind}': field {name}: Field required"):
            journal.append(kind, **{key: value for key, value in KNOWN[kind].items() if key != name})
    assert needed and path.read_bytes() == b""
    written = add(journal, kind)
    (event,) = Journal(path, readonly=True).events(KINDS[kind])
    assert event == written and type(event) is KINDS[kind]
    line = path.read_text().rstrip("\n")
    assert json.dumps(to_plain(event.as_record()), separators=(",", ":")) == line
    names = list(json.loads(line))
    assert names == [*EVENT_FIELDS[:3], *(n for n in own_fields(KINDS[kind]) if n in names), EVENT_FIELDS[3]]
    assert set(KNOWN[kind]) <= set(names)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("probe", {"step": "7"}, "field step: "),
    ("probe", {"step": True}, "field step: "),
    ("probe", {"step": -1}, "field step: "),
    ("probe", {"phase": None}, "field phase: "),
    ("probe", {"note": "x"}, "field note: Extra inputs"),
    ("probe", {"sets": {"base": {"loss": 3.5}}}, "field sets.base.reference: Field required"),
    ("probe", {"sets": {"base": reading().model_copy(update={"loss": "3.5"})}}, "field sets.base.loss: .*number"),
    ("rollback", {"window": [1]}, "field window: "),
    ("entry", {"file": "../x.safetensors"}, r"field file: .*'\.\./x\.safetensors' can't be used"),
    ("samples", {"texts": [{"prompt": "the"}]}, r"field texts\.0\.text: Field required"),
    ("pruned", {"files": [1]}, r"field files\.0: "),
]


@pytest.mark.parametrize(("kind", "change", "words"), WRONG)
def test_what_is_wrong_is_not_written_and_is_named_where_it_is_read(
    path: Path, kind: str, change: dict[str, Any], words: str
) -> None:
    journal = Journal(path)
    add(journal, "interrupted")
    before = path.read_bytes()
    with pytest.raises(JournalError, match=rf"^event '{kind}': {words}"):
        add(journal, kind, **change)
    assert path.read_bytes() == before
    add_line(journal, kind, **to_plain({**KNOWN[kind], **change}))
    line = rf"line 2 is no proper `{kind}` event: {words}"
    for kinds in ((), (KINDS[kind],)):
        with pytest.raises(JournalError, match=rf"ledger/journal\.jsonl {line}"):
            journal.events(*kinds)
    assert [problem.where for problem in verify(path.parent).problems if re.search(line, problem.what)] == [path.name]
    if kind in ("entry", "pruned"):
        with pytest.raises(JournalError, match=line):
            Ledger(path.parent)
    else:  # stops only those that need it
        assert Ledger(path.parent).entries() == []


def test_a_kind_of_another_version_is_read_and_not_written(path: Path) -> None:
    journal = Journal(path)
    with pytest.raises(JournalError, match="event 'quarantined': a journal has no such kind; it has run, phase_start"):
        journal.append("quarantined", shard=1)
    for fields, words in (({"seq": 1}, "'seq' is the journal's own"), ({"facts": {"a": object()}}, r"\.facts\.a is a")):
        with pytest.raises(JournalError, match=words):
            add(journal, "run", **fields)
    add_line(journal, "quarantined", shard=1, why={"a": None})
    (event,) = journal.events()
    assert isinstance(event, UnknownEvent) and to_plain(event.as_record()) == journal.records()[0]
    assert list(event.as_record()) == ["seq", "time", "event", "shard", "why", "previous"]
    assert journal.events(RolledBack) == []
    assert verify(path.parent).ok


def test_the_docs_name_every_kind_and_every_field_in_order() -> None:
    table, _, rest = RUNS.read_text(encoding="utf-8").partition("| event | fields | says |\n")[2].partition("\n\n")
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()[1:]]
    told = {re.findall(r"`(\w+)`", kind)[0]: re.findall(r"`(\w+)`", fields) for kind, fields, _ in rows}
    assert told == {name: own_fields(kind) for name, kind in KINDS.items()}
    of_a_set = rest.partition("Of each probe set")[2].partition("\n\n")[0]
    assert set(ProbeReading.model_fields) == set(re.findall(r"`(\w+)`", of_a_set)) - {"sets", "start", "commit"}
