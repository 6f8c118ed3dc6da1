"""Is a run's ledger whole: the journal's chain, every entry's file, what lies beside them, and what snapshots noted.

It needs no base model and changes no byte; the run may be training right now, or be a copy on another machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from revpatch.durable import TEMPORARY_SUFFIX, sha256_of_file
from revpatch.ledger.events import EntryWritten
from revpatch.ledger.history import (
    ENTRY_EVENTS,
    JOURNAL_NAME,
    ledger_of,
    live_entries,
    pruned_names,
    run_of,
    stray_files,
)
from revpatch.ledger.journal import GENESIS, Scan, events_in, scan
from revpatch.ledger.patch_file import EntryError, read_metadata

SNAPSHOTS = "snapshot"
"""A run's folder of snapshots. Each notes the journal's head as it was then."""


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
    hashed: bool = True
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


def verify(run: Path, expected_head: str | None = None, hash_files: bool = True) -> VerifyReport:
    """Checks the journal's hash chain and every entry's presence, size and sha256, and looks for strays.

    `expected_head` is a `head` noted earlier: the chain must still hold it, which shows what the chain alone can't,
    lines missing at the end and an edited last line. The run's own snapshots have noted such heads too. Without
    `hash_files` a file is looked at only for its size. Damage is reported, not raised; OSError if a file can't be read.
    """
    directory = ledger_of(run)
    report = VerifyReport(directory, hash_files)
    if not (directory / JOURNAL_NAME).is_file():
        report.add(str(directory / JOURNAL_NAME), "is not there", "Is this the folder of a run? Or take a backup.")
        return report
    # Files and snapshots are looked at before the journal is read: what a running trainer adds meanwhile is then no
    # orphan, and no head that the journal doesn't hold yet.
    files = stray_files(directory, live={})
    noted = _snapshots_heads(run_of(directory) / SNAPSHOTS, report)
    found = scan((directory / JOURNAL_NAME).read_bytes())
    report.events = len(found.records)
    report.head = found.digests[-1] if found.digests else GENESIS
    _check_journal(found, noted, expected_head, report)
    improper: list[str] = []
    events = [e for e in events_in(found.records, problems=improper) if isinstance(e, ENTRY_EVENTS)]
    live = live_entries(events)
    for problem in improper:
        report.add(JOURNAL_NAME, problem, "Take journal.jsonl from a backup.")
    for entry in live.values():
        _check_entry(directory, entry, report)
    _check_strays(files, live, pruned_names(events), report)
    return report


def _snapshots_heads(directory: Path, report: VerifyReport) -> dict[str, tuple[int, str]]:
    """By the snapshot's name: how many events the journal had, and its head."""
    noted = {}
    for path in sorted(directory.glob("step*.safetensors")) if directory.is_dir() else []:
        try:
            metadata = read_metadata(path)
            noted[f"{SNAPSHOTS}/{path.name}"] = int(metadata["events"]), str(metadata["head"])
        except (EntryError, KeyError, TypeError, ValueError) as error:
            if path.exists():  # a running trainer keeps the newest only
                report.add(f"{SNAPSHOTS}/{path.name}", f"is no whole snapshot ({error})", "Move it away.")
    return noted


def _check_journal(found: Scan, noted: dict[str, tuple[int, str]], expected: str | None, report: VerifyReport) -> None:
    if not found.records and not found.problems and not found.torn:
        advice = "The run has not begun its first step, or the journal was lost: then take it from a backup."
        report.add(JOURNAL_NAME, "is empty", advice)
    for problem in found.problems:
        advice = "Take journal.jsonl from a backup; what follows this line can't be relied upon."
        report.add(JOURNAL_NAME, problem, advice)
    if found.torn:
        what = f"its last line is cut short ({len(found.torn)} bytes without an end)"
        report.add(
            JOURNAL_NAME, what, "If the run is alive, ask again; else a crash left it, and what is before it is whole."
        )
    if expected is not None and expected not in (GENESIS, *found.digests):
        what = f"expected a line with sha256 {expected}, found none; its last line has {report.head}"
        report.add(JOURNAL_NAME, what, "Lines at the end were removed or edited: take it from a backup.")
    for name, (events, head) in noted.items():
        if events and (len(found.digests) < events or found.digests[events - 1] != head):
            what = f"{name} noted line {events} with sha256 {head}, which is not there"
            report.add(JOURNAL_NAME, what, "Lines at the end were removed or edited: take it from a backup.")


def _check_entry(directory: Path, entry: EntryWritten, report: VerifyReport) -> None:
    report.entries += 1
    place = f"(journal line {entry.seq + 1})"
    try:
        size = (directory / entry.name).stat().st_size
    except FileNotFoundError:
        report.add(entry.name, f"is missing {place}", "Take it from a backup.")
        return
    if size != entry.bytes:
        what = f"has {size} bytes, expected {entry.bytes} {place}"
        report.add(entry.name, what, "It was cut or replaced: take it from a backup.")
        return
    if not report.hashed:
        return
    report.bytes_hashed += size
    if (sha256 := sha256_of_file(directory / entry.name)) != entry.sha256:
        what = f"has sha256 {sha256}, expected {entry.sha256} {place}"
        report.add(entry.name, what, "It was damaged or edited: take it from a backup, and don't load it.")


def _check_strays(files: list[Path], live: dict[str, EntryWritten], pruned: set[str], report: VerifyReport) -> None:
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
