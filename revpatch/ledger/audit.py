"""What a person asks of a run's ledger, without its base model and without changing a byte: what happened, is it whole.

Both functions take the run's folder, which may be of a run that is training right now, or a copy on another machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revpatch.ledger.durable import TEMPORARY_SUFFIX, sha256_of_file
from revpatch.ledger.history import JOURNAL_NAME, Recorded, live_entries, pruned_names, stray_files
from revpatch.ledger.journal import EVENT_FIELDS, GENESIS, Journal, scan

_IN_COLUMNS = ("kind", "phase", "phase_index", "step", "bytes", "sha256", "sets")


@dataclass(frozen=True)
class ProbeReading:
    """One probe set's losses in nats per token; what the journal doesn't say is None. A set that was measured but
    not guarded then (a corpus that no phase had learned yet) has no tolerance."""

    name: str
    loss: float | None
    reference: float | None
    rise: float | None
    tolerance: float | None


@dataclass(frozen=True)
class LogRow:
    """One event; `kind` (of an entry) is empty for any other. `note` says why, or what else was recorded."""

    seq: int
    time: str
    event: str
    kind: str
    phase: str
    step: int | None
    probes: list[ProbeReading]
    bytes: int | None
    sha256: str
    note: str


@dataclass(frozen=True)
class Problem:
    """`where` names the file or line; `advice` says what to do."""

    where: str
    what: str
    advice: str


@dataclass
class VerifyReport:
    """What `verify` looked at and found; `head` is the sha256 of the journal's last line, to be noted elsewhere."""

    directory: Path
    events: int = 0
    entries: int = 0
    bytes_hashed: int = 0
    head: str = GENESIS
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, where: str, what: str, advice: str) -> None:
        self.problems.append(Problem(where, what, advice))


def log_rows(run: Path) -> list[LogRow]:
    """Every event of the run in `run`, oldest first, unknown ones too. Raises JournalError for a damaged journal."""
    return [_row(event) for event in Journal(run / "ledger" / JOURNAL_NAME, readonly=True).records()]


def verify(run: Path, expected_head: str | None = None) -> VerifyReport:
    """Checks the journal's hash chain and every entry's presence, size and sha256, and looks for strays.

    `expected_head` is a `head` noted earlier: the chain must still hold it, which shows what the chain alone can't,
    lines missing at the end and an edited last line. Damage is reported, not raised; OSError if a file can't be read.
    """
    directory = run / "ledger"
    report = VerifyReport(directory)
    if not (directory / JOURNAL_NAME).is_file():
        report.add(str(directory / JOURNAL_NAME), "is not there", "Is this the folder of a run? Or take a backup.")
        return report
    # Files are listed before the journal is read: an entry that a running trainer adds meanwhile is then no orphan.
    files = stray_files(directory, live={})
    found = scan((directory / JOURNAL_NAME).read_bytes())
    report.events = len(found.records)
    report.head = found.digests[-1] if found.digests else GENESIS
    for problem in found.problems:
        advice = "Take journal.jsonl from a backup; what follows this line can't be relied upon."
        report.add(JOURNAL_NAME, problem, advice)
    if found.torn:
        what = f"its last line is cut short ({len(found.torn)} bytes without an end)"
        report.add(
            JOURNAL_NAME, what, "If the run is alive, ask again; else a crash left it, and what is before it is whole."
        )
    if expected_head is not None and expected_head not in (GENESIS, *found.digests):
        what = f"expected a line with sha256 {expected_head}, found none; its last line has {report.head}"
        report.add(JOURNAL_NAME, what, "Lines at the end were removed or edited: take it from a backup.")
    improper: list[str] = []
    live = live_entries(found.records, improper)
    for problem in improper:
        report.add(JOURNAL_NAME, problem, "Take journal.jsonl from a backup.")
    for entry in live.values():
        _check_entry(directory, entry, report)
    pruned = pruned_names(found.records)
    for path in files:
        if path.name in live or not path.exists():
            continue
        if path.name in pruned:
            report.add(path.name, "was pruned but is still there", "Delete it.")
        elif path.suffix == TEMPORARY_SUFFIX:
            report.add(path.name, "is half-written", "If the run is alive, ask again; else a crash left it: delete it.")
        else:
            report.add(
                path.name, "is in no journal line (an orphan)", "A crash may have left it: move it out of the ledger."
            )
    return report


def _check_entry(directory: Path, entry: Recorded, report: VerifyReport) -> None:
    path = directory / entry.name
    report.entries += 1
    if not path.is_file():
        report.add(entry.name, f"is missing (journal line {entry.seq + 1})", "Take it from a backup.")
        return
    size = path.stat().st_size
    if size != entry.bytes:
        what = f"has {size} bytes, expected {entry.bytes} (journal line {entry.seq + 1})"
        report.add(entry.name, what, "It was cut or replaced: take it from a backup.")
        return
    report.bytes_hashed += size
    if (sha256 := sha256_of_file(path)) != entry.sha256:
        what = f"has sha256 {sha256}, expected {entry.sha256} (journal line {entry.seq + 1})"
        report.add(entry.name, what, "It was damaged or edited: take it from a backup, and don't load it.")


def _row(event: dict[str, Any]) -> LogRow:
    sets = event.get("sets")
    probes = [_reading(name, values) for name, values in sets.items()] if isinstance(sets, dict) else []
    return LogRow(
        seq=event["seq"],
        time=str(event["time"]),
        event=event["event"],
        kind=str(event.get("kind", "")),
        phase=str(event.get("phase", "")),
        step=_integer(event.get("step")),
        probes=probes,
        bytes=_integer(event.get("bytes")),
        sha256=str(event.get("sha256", "")),
        note=_note(event),
    )


def _note(event: dict[str, Any]) -> str:
    rest = {key: value for key, value in event.items() if key not in (*EVENT_FIELDS, *_IN_COLUMNS)}
    if event["event"] == "entry":
        return str(event.get("file", ""))
    if event["event"] == "rollback":
        reason, to_file = rest.pop("reason", "no reason was recorded"), rest.pop("to_file", "an unnamed entry")
        window, factor = rest.pop("window", None), rest.pop("new_lr_factor", None)
        pieces = [str(reason), f"back to {to_file}"]
        if isinstance(window, list) and len(window) == 2:
            pieces.append(f"skipped steps {window[0]} to {window[1]}")
        if factor is not None:
            pieces.append(f"learning rate factor {factor}")
        return "; ".join(pieces + [f"{key} {value}" for key, value in rest.items()])
    if event["event"] == "pruned":
        return ", ".join(map(str, rest.get("files", [])))
    return ", ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in rest.items())


def _reading(name: str, values: Any) -> ProbeReading:
    values = values if isinstance(values, dict) else {"loss": values}
    loss, reference, rise, tolerance = (_number(values.get(key)) for key in ("loss", "reference", "rise", "tolerance"))
    if rise is None and loss is not None and reference is not None:
        rise = loss - reference
    if values.get("guarded") is False:
        tolerance = None
    return ProbeReading(name, loss, reference, rise, tolerance)


def _number(value: Any) -> float | None:
    try:
        return float(value)  # "NaN" and "Infinity" are how the journal spells them
    except (TypeError, ValueError):
        return None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None
