"""The journal: what happened in a run, one JSON line an event, each line carrying the sha256 of the line before.

    {"seq": 4, "time": "2025-01-31T12:00:00.000000+00:00", "event": "commit", ..., "previous": "9f2c..."}

An edited, removed or moved line breaks the chain at the line after it, which is refused by number. What the chain
alone can't show is whole lines missing at the end, or an edited last line: for that, keep `head` elsewhere (a
snapshot, a lab book) and ask `holds(head)`. A last line without its newline is what a crash in the middle of a write
leaves: it is set aside, and said so, when the journal is opened for writing. One process writes; any number read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar, cast

from revpatch.durable import sha256_of, sync_directory, to_plain, write_atomically
from revpatch.ledger.events import KINDS, Event, event_of

GENESIS = sha256_of(b"revpatch journal, version 1")
E = TypeVar("E", bound=Event)
EVENT_FIELDS = ("seq", "time", "event", "previous")
_decode = json.JSONDecoder().raw_decode  # json.loads looks for white space around the value: a fifth of the time


class JournalError(ValueError):
    """A journal that can't be believed, or an event that can't be written to it; names file and line."""


@dataclass
class Scan:
    """What the bytes of a journal hold: events in order, the sha256 of each line, a torn end, what is wrong."""

    records: list[dict[str, Any]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    torn: bytes = b""
    problems: list[str] = field(default_factory=list)


def events_in(
    records: Iterable[dict[str, Any]], kinds: tuple[type[Event], ...] = (), problems: list[str] | None = None
) -> Iterator[Event]:
    """Yield the events of lines, in their order: of these kinds, or of all, unknown ones too, where none is named.

    A line of another kind is not looked at. One that is no proper event of its kind raises JournalError, or is passed
    over and named, by its number, in `problems`.
    """
    for record in records:
        if kinds and KINDS.get(record["event"]) not in kinds:
            continue
        try:
            yield event_of(record)
        except ValueError as error:
            words = f"line {record['seq'] + 1} is no proper `{record['event']}` event: {error}"
            if problems is None:
                raise JournalError(words) from error
            problems.append(words)


def scan(data: bytes) -> Scan:
    """Reads as many events as there are, and goes on past what is wrong, so that every broken line is named."""
    found = Scan()
    *lines, found.torn = data.split(b"\n")
    seq, previous = 0, GENESIS
    for number, line in enumerate(lines, start=1):
        record, digest = _parsed(line), sha256_of(line)
        if record is None:
            found.problems.append(f"line {number} is not an event ({line[:40]!r}...): it was damaged or edited")
        else:
            if record["seq"] != seq:
                found.problems.append(
                    f"line {number} has seq {record['seq']}, expected {seq}: lines were removed, added or reordered"
                )
            if record["previous"] != previous:
                found.problems.append(
                    f"line {number} names the line before it by sha256 {record['previous']}, found {previous}: "
                    f"line {max(number - 1, 1)} was edited, or lines were removed, added or reordered"
                )
            found.records.append(record)
            found.digests.append(digest)
            seq = record["seq"]
        seq, previous = seq + 1, digest
    return found


class Journal:
    """The journal at `path`; opened for writing (created if missing, a torn end set aside) or `readonly`.

    Raises JournalError when a line is damaged or the chain is broken, or `readonly` finds no file. `warnings` says in
    sentences what was done at opening. A torn end seen `readonly` may be a line that is being written right now.
    """

    def __init__(self, path: Path, readonly: bool = False) -> None:
        self.path = path
        self.readonly = readonly
        self.warnings: list[str] = []
        if readonly and not path.is_file():
            raise JournalError(f"{path} is not there. Is {path.parent.parent} the folder of a run?")
        data = path.read_bytes() if path.exists() else b""
        found = scan(data)
        if found.problems:
            raise JournalError(
                f"{path} {found.problems[0]}. Restore the journal from a backup: what follows that line "
                "can't be relied upon."
            )
        self.torn = found.torn
        self._records = found.records
        self._digests = found.digests
        self._size = len(data)
        if readonly:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()
            sync_directory(path.parent)
        if self.torn:
            self._set_aside_torn()

    @property
    def head(self) -> str:
        """The sha256 of the last line (without its newline); GENESIS while there is none."""
        return self._digests[-1] if self._digests else GENESIS

    def events(self, *kinds: type[E]) -> list[E]:
        """Return the events of these kinds, or all, oldest first.

        Raises JournalError, with file and line, for one of them that is no proper event of its kind.
        """
        try:
            return cast(list[E], list(events_in(self._records, kinds)))
        except JournalError as error:
            raise JournalError(f"{self.path} {error}") from error

    def check_begun(self) -> None:
        """Raise JournalError where there is no event: it is no run's history yet."""
        if not self._records:
            raise JournalError(
                f"{self.path} is empty: the run has not begun its first step, or its journal was lost; then put it "
                "back from a backup (`revpatch ledger verify RUN` looks at what is there)"
            )

    def holds(self, head: str) -> bool:
        """Return whether a head that was noted earlier is still part of this history."""
        return head == GENESIS or head in self._digests

    def head_after(self, events: int) -> str | None:
        """Return the head after the first `events` events; None if there were never so many."""
        if events > len(self._digests):
            return None
        return self._digests[events - 1] if events else GENESIS

    def records(self) -> list[dict[str, Any]]:
        """Return all lines as JSON has them, oldest first: `seq`, `time`, `event`, the kind's fields, `previous`."""
        return list(self._records)

    def lines(self) -> list[bytes]:
        """The same as they stand in the file, each without its newline; read anew. Raises OSError."""
        return self.path.read_bytes()[: self._size].split(b"\n")[: len(self._records)]

    def append(self, event: str, **fields: Any) -> Event:
        """Write an event of a kind in `KINDS`, synced to disk before this returns, and return it.

        Raises JournalError for an unknown kind, a field that is missing, wrong, unknown or not plain, a `readonly`
        journal, or a file that another process has changed since; OSError when the disk fails, with the file cut back
        to its whole lines.
        """
        if self.readonly:
            raise JournalError(f"{self.path} was opened for reading only; event {event!r} can't be added")
        if event not in KINDS:
            raise JournalError(f"event {event!r}: a journal has no such kind; it has {', '.join(KINDS)}")
        if clash := [name for name in EVENT_FIELDS if name in fields]:
            raise JournalError(f"event {event!r}: the field {clash[0]!r} is the journal's own; choose another name")
        time = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        own = {"seq": len(self._records), "time": time, "event": event, "previous": self.head}
        try:
            plain = to_plain(fields, where=f"event {event!r}")
        except ValueError as error:
            raise JournalError(str(error)) from error
        try:
            written = event_of({**plain, **own})
        except ValueError as error:
            raise JournalError(f"event {event!r}: {error}") from error
        record = to_plain(written.as_record())
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
        self._write(line + b"\n")
        self._records.append(record)
        self._digests.append(sha256_of(line))
        return written

    def _write(self, data: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            if (size := os.fstat(descriptor).st_size) != self._size:
                raise JournalError(
                    f"{self.path} has {size} bytes, expected {self._size}: another process writes to this run. Stop "
                    "one of the two, then start again."
                )
            try:
                written = 0
                while written < len(data):
                    written += os.write(descriptor, data[written:])
                os.fsync(descriptor)
            except OSError as error:
                os.ftruncate(descriptor, self._size)
                raise OSError(error.errno, f"could not record an event ({error.strerror})", str(self.path)) from error
            self._size += len(data)
        finally:
            os.close(descriptor)

    def _set_aside_torn(self) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.torn-{number}")).exists():
            number += 1
        write_atomically(aside, self.torn)
        self._size -= len(self.torn)
        os.truncate(self.path, self._size)
        self.append("torn", file=aside.name, bytes=len(self.torn))
        self.warnings.append(
            f"{self.path}: the last line was cut short by a crash ({len(self.torn)} bytes); it is kept in {aside.name}"
        )


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        text = line.decode()
        record, end = _decode(text)
    except (ValueError, RecursionError):
        return None
    if end != len(text) or not isinstance(record, dict) or not all(name in record for name in EVENT_FIELDS):
        return None
    texts = (record["time"], record["event"], record["previous"])
    return record if type(record["seq"]) is int and all(isinstance(text, str) for text in texts) else None
