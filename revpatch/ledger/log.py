"""A run's history, read from its journal alone: what happened, what of it still counts, which entries are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from revpatch.durable import printable, size
from revpatch.ledger.events import (
    EntriesPruned,
    EntryWritten,
    PhaseCommitted,
    Probed,
    Readings,
    RunResumed,
    UnknownEvent,
    event_of,
)
from revpatch.ledger.journal import EVENT_FIELDS, Journal, events_in
from revpatch.ledger.ledger import ENTRY_EVENTS, JOURNAL_NAME, ledger_of, names_gone

KEPT, PRUNED, SUPERSEDED, AGAIN, UNDONE = "kept", "pruned", "superseded", "recorded again", "undone"
_IN_COLUMNS = frozenset(("kind", "phase", "phase_index", "step", "bytes", "sha256", "sets", *EVENT_FIELDS))
_DONE_FOR_GOOD = ("pruned", "orphan", "torn", "resume")
_WITH_READINGS = (Probed, EntryWritten, PhaseCommitted)
_IN_NOTE_OF_RUN = ("ranks", "device", "engine")


class LogRow(NamedTuple):
    """One event; `kind` (of an entry) is empty for any other, `note` says why, or what else was recorded; or, of a
    line that is no proper event of its kind, what is wrong with it.

    `state` of an entry: its file is kept, was pruned, was superseded (the run went back before it, and its file was
    set aside), or was recorded again, by a later line. Of another event: undone if the run went back before it, else
    empty.
    """

    seq: int
    time: str
    event: str
    kind: str
    phase: str
    step: int | None
    probes: Readings
    bytes: int | None
    sha256: str
    note: str
    state: str


def log_rows(run: Path) -> list[LogRow]:
    """Return every event of the run in `run`, oldest first, unknown ones too. Raises JournalError for a damaged
    journal."""
    return list(rows_of(Journal(ledger_of(run) / JOURNAL_NAME, readonly=True).records()))


def rows_of(records: list[dict[str, Any]]) -> Iterator[LogRow]:
    """The same, of lines that were read already."""
    sets, told = None, Readings()
    for record, state in zip(records, states_of(records), strict=True):
        note = None
        try:
            event = event_of(record)
        except ValueError as error:
            event, note = UnknownEvent.model_validate(record), f"no proper event of its kind: {error}"
        if record.get("sets") != sets:  # an entry repeats what the probe before it has measured
            sets = record.get("sets")
            told = (event.sets or {}) if isinstance(event, _WITH_READINGS) else {}
        yield _row(record, told, state, note)


def as_json(run: Path) -> str:
    """Return the run, the journal's head and all events, each with its `state`, as one line of JSON.

    The events are the journal's own lines, which are JSON already. Raises JournalError for a damaged or an empty
    journal.
    """
    journal = Journal(ledger_of(run) / JOURNAL_NAME, readonly=True)
    journal.check_begun()
    states = states_of(journal.records())
    events = ", ".join(
        f'{line.decode()[:-1]},"state":"{state}"}}' for line, state in zip(journal.lines(), states, strict=True)
    )
    return f'{{"run": {json.dumps(str(run))}, "head": "{journal.head}", "events": [{events}]}}'


def states_of(records: list[dict[str, Any]]) -> list[str]:
    """Return what `LogRow.state` says of each line; one that is no proper event changes nothing."""
    states = [""] * len(records)
    live: dict[str, int] = {}
    for event in events_in(records, ENTRY_EVENTS, problems=[]):
        if isinstance(event, EntryWritten):
            if (earlier := live.pop(event.file, None)) is not None:
                states[earlier] = AGAIN
            live[event.file] = event.seq
            states[event.seq] = KEPT
        elif isinstance(event, RunResumed):
            for undone in range(event.undoes_from, event.seq):
                if records[undone]["event"] not in _DONE_FOR_GOOD:
                    states[undone] = states[undone] or UNDONE
        for name in names_gone(event):
            if (gone := live.pop(name, None)) is not None:
                states[gone] = PRUNED if isinstance(event, EntriesPruned) else SUPERSEDED
    return states


def _row(event: dict[str, Any], probes: Readings, state: str, note: str | None) -> LogRow:
    return LogRow(
        event["seq"],
        str(event["time"]),
        event["event"],
        str(event.get("kind", "")),
        str(event.get("phase", "")),
        _integer(event.get("step")),
        probes,
        _integer(event.get("bytes")),
        str(event.get("sha256", "")),
        _note(event) if note is None else note,
        state,
    )


def _note(event: dict[str, Any]) -> str:
    kind = event["event"]
    if kind == "entry" and "restored" not in event:
        file, how = str(event.get("file", "")), how_made(event.get("made_by"))
        return f"{file}, {how}" if how else file
    rest = {key: value for key, value in event.items() if key not in _IN_COLUMNS}
    if kind in _NOTES:
        return _NOTES[kind](rest)
    return _listed(rest)


def how_made(made_by: Any) -> str:
    """Return how an entry was made that was not trained, in words, and that it was forced; empty for any other."""
    if not isinstance(made_by, dict):
        return ""
    operation, get = made_by.get("operation"), made_by.get
    words = str(operation)
    if operation == "revert":
        words += f" of {get('phase')}"
        if get("method") == "bypass":
            words += f" by bypassing the sidecars after blocks {_names(get('layers'))}"
    elif operation == "merge" and isinstance(parents := get("parents"), list):
        words += f" of {_names([_short(sha256) for sha256 in parents])} with weights {_names(get('weights'))}"
    elif operation == "import":
        words += f" of {_short(get('sha256'))}"
        words += f", itself made by {earlier}" if (earlier := how_made(get("made_by"))) else ""
    return f"{words}, forced: {get('forced')}" if "forced" in made_by else words


def _listed(rest: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in rest.items())


def _note_of_origin(rest: dict[str, Any]) -> str:
    source = rest["restored"] if isinstance(rest["restored"], dict) else {}
    return f"{rest.get('file', '')}, restored from {source.get('from', '?')}"


def _note_of_rollback(rest: dict[str, Any]) -> str:
    reason, to_file = rest.pop("reason", "no reason was recorded"), rest.pop("to_file", "an unnamed entry")
    window, factor = rest.pop("window", None), rest.pop("new_lr_factor", None)
    pieces = [str(reason), f"back to {to_file}"]
    if isinstance(window, list) and len(window) == 2:
        pieces.append(f"skipped steps {window[0]} to {window[1]}")
    if factor is not None:
        pieces.append(f"learning rate factor {factor}")
    return "; ".join(pieces + [f"{key} {value}" for key, value in rest.items()])


def _note_of_resume(rest: dict[str, Any]) -> str:
    snapshot, since = rest.get("snapshot"), rest.get("undoes_from")
    pieces = [f"on from snapshot {snapshot}" if snapshot else "begun again, as there was no snapshot"]
    if superseded := rest.get("superseded"):
        pieces.append(f"set aside, to be made again: {_names(superseded)}")
    if orphans := rest.get("orphans"):
        pieces.append(f"orphans of a crash: {_names(orphans)}")
    if isinstance(changed := rest.get("changed"), dict):
        pieces += [f"{key} now {_new(values)}" for key, values in changed.items()]
    pieces.append(f"events from #{since} to here don't count")
    return "; ".join(pieces)


def _note_of_run(rest: dict[str, Any]) -> str:
    base, facts = (rest[key] if isinstance(rest.get(key), dict) else {} for key in ("base", "facts"))
    if not base:
        return _listed(rest)
    pieces = [f"base {base.get('model')} ({base.get('dtype')}, sha256 {_short(base.get('sha256'))})"]
    pieces += [f"{key} {facts[key]}" for key in _IN_NOTE_OF_RUN if key in facts]
    return ", ".join([*pieces, f"seed {rest.get('seed')}"])


def _note_of_run_end(rest: dict[str, Any]) -> str:
    base = rest.pop("bare_base", None)
    pieces = [f"the base's weights have sha256 {_short(base.get('weights'))}"] if isinstance(base, dict) else []
    return ", ".join([*pieces, _listed(rest)] if rest else pieces)


def _note_of_pruned(rest: dict[str, Any]) -> str:
    return ", ".join(map(str, [*rest.get("files", []), *rest.get("leftovers", [])]))


_NOTES = {
    "entry": _note_of_origin,
    "rollback": _note_of_rollback,
    "resume": _note_of_resume,
    "run": _note_of_run,
    "run_end": _note_of_run_end,
    "pruned": _note_of_pruned,
}


def _names(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _short(sha256: Any) -> str:
    return f"{str(sha256)[:12]}…"


def _new(values: Any) -> str:
    return json.dumps(values[-1] if isinstance(values, list) and values else values)


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None


_COLOURS = {
    "good": "cyan",
    "commit": "bold green",
    "rollback": "bold red",
    "origin": "magenta",
    "resume": "yellow",
    "orphan": "yellow",
    "torn": "yellow",
}
_GONE = (PRUNED, SUPERSEDED, UNDONE, AGAIN)
_SHORT_SHA256 = 12


def print_log(run: Path, console: Console, last: int | None = 100) -> None:
    """Prints the last events of the run in `run`, or all of them for None, oldest first, then what is kept.

    Raises JournalError for a damaged or an empty journal.
    """
    journal = Journal(ledger_of(run) / JOURNAL_NAME, readonly=True)
    journal.check_begun()
    rows = list(rows_of(journal.records()))
    shown = rows if last is None else rows[-last:]
    if len(shown) < len(rows):
        console.print(f"{len(rows) - len(shown)} earlier events are not shown: --all", style="dim")
    for row in shown:
        before = rows[row.seq - 1].probes if row.seq else None
        console.print(_paragraph(row, row.probes is not before), soft_wrap=True)
    kept = [row for row in rows if row.state == KEPT]
    newest = f", newest {_file(kept[-1])}" if kept else ""
    commit = next((_file(row) for row in reversed(kept) if row.kind == "commit"), "none yet")
    total = size(sum(row.bytes or 0 for row in kept))
    console.print(Text(f"{len(kept)} entries kept, {total}{newest}; newest commit {commit}", "bold"), soft_wrap=True)
    console.print(Text(f"head of the journal: {journal.head}"), soft_wrap=True)


def _file(row: LogRow) -> str:
    """Return the name with which the note of an entry begins."""
    return row.note.partition(", ")[0]


def _paragraph(row: LogRow, with_probes: bool) -> Text:
    gone = row.state in _GONE
    indent = "\n" + " " * (len(f"#{row.seq}") + 2)
    text = Text.assemble((f"#{row.seq}  {row.time[:19].replace('T', ' ')}  ", "dim"))
    place = " ".join(piece for piece in (row.phase, "" if row.step is None else f"step {row.step}") if piece)
    if place:
        text.append(printable(place) + "  ")
    colour = "dim" if gone else _COLOURS.get(row.kind or row.event, "")
    text.append(printable(f"{row.kind} {row.event}".strip()), colour)
    if row.bytes is not None:
        text.append(f"  {size(row.bytes)}")
    if row.sha256:
        text.append(printable(f"  {row.sha256[:_SHORT_SHA256]}"), "dim")
    if gone:
        text.append(f"  {row.state}", "dim")
    if row.note:
        text.append(indent + printable(row.note))
    for name, reading in row.probes.items() if with_probes else ():
        limit = f" / {reading.tolerance:g}" if reading.guarded else ""
        # Not "greater than": a rise that is NaN is too high as well.
        high = reading.guarded and not reading.rise <= reading.tolerance
        text.append(f"{indent}{printable(name)} {reading.loss:.3f} ")
        text.append(f"({reading.rise:+.3f}{limit})", "red" if high else "")
    return text
