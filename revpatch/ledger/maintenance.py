"""A ledger verified, pruned, and restored as a new run. None of it needs the base model.

`verify` changes no byte; the run may be training right now. `prune` takes `good` entries alone, beyond the newest few
of each phase. `restore` makes NEW/ledger with one `origin` event and its patch; NEW appears when it is whole, and what
a killed process left of it (`.NEW.unfinished`) goes when it is restored again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from revpatch.durable import TEMPORARY_SUFFIX, new_folder, sha256_of_file, size, unfinished
from revpatch.ledger.events import EntryWritten, RolledBack, RunResumed
from revpatch.ledger.inspect import check_patch, layer_facts
from revpatch.ledger.journal import GENESIS, JournalError, Scan, events_in, scan
from revpatch.ledger.ledger import (
    ENTRY_EVENTS,
    JOURNAL_NAME,
    Ledger,
    PatchFile,
    effective,
    folder_noted,
    ledger_of,
    live_entries,
    lock_run,
    pruned_names,
    read_patch,
    run_of,
    stray_files,
)
from revpatch.ledger.patch_file import SUFFIX, EntryError, read_metadata

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


_SUPERSEDED = re.compile(rf"(.*{re.escape(SUFFIX)})\.superseded(?:-(\d+))?")


@dataclass(frozen=True)
class Pruned:
    """What went, or would go: names of entries and of files set aside by earlier resumes, and bytes.

    `spared` says of each entry that stays beyond the count why it does.
    """

    entries: list[str]
    leftovers: list[str]
    bytes: int
    spared: dict[str, str]
    dry_run: bool


def prune(run: Path, keep: int, dry_run: bool = False) -> Pruned:
    """Removes all but the newest `keep` (at least 1) `good` entries of each phase, and what earlier resumes set aside.

    Raises:
        JournalError: there is no journal, or it is damaged.
        EntryError: a snapshot can't be read, so that nobody knows what it needs.
        ValueError: another process writes to the folder; or `keep` is below 1.
    """
    directory = ledger_of(run)
    if not (directory / JOURNAL_NAME).is_file():
        raise JournalError(f"{directory / JOURNAL_NAME} is not there. Is {run} the folder of a run?")
    run = run_of(directory)
    lock = lock_run(run)
    if lock is None:
        raise ValueError(f"{run}: another process is writing to this folder: wait for it or stop it, then prune")
    with lock:
        ledger = Ledger(directory, readonly=dry_run)
        needed = _needed(run, ledger)
        surplus, leftovers = ledger.surplus_good(keep, needed), _leftovers(ledger)
        spared = [entry.name for entry in ledger.surplus_good(keep) if entry.name in needed]
        size = sum(entry.bytes for entry in surplus) + sum(path.stat().st_size for path in leftovers)
        if not dry_run:
            ledger.remove(surplus, leftovers)
        return Pruned(
            [entry.name for entry in surplus],
            [path.name for path in leftovers],
            size,
            {name: needed[name] for name in spared},
            dry_run,
        )


def _needed(run: Path, ledger: Ledger) -> dict[str, str]:
    """Entries that something refers to, by name, and what that is."""
    needed: dict[str, str] = {}  # the newest entry is not among them: it is the newest of its phase, and stays
    for event in effective(ledger.journal.events(RolledBack, RunResumed)):
        if isinstance(event, RolledBack):
            needed[event.to_file] = f"the rollback of journal line {event.seq + 1} went back to it"
    by_sha256 = {entry.sha256: entry.name for entry in ledger.entries()}
    snapshots = run / SNAPSHOTS
    for path in sorted(snapshots.glob("step*.safetensors")) if snapshots.is_dir() else []:
        for text in _texts(read_metadata(path)):  # names and sha256s, wherever they stand
            needed.setdefault(by_sha256.get(text, text), f"snapshot {path.name} goes on from it")
    return needed


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _leftovers(ledger: Ledger) -> list[Path]:
    """Files that resumes have set aside, without what the newest resume did."""
    resumes = ledger.journal.events(RunResumed)
    newest = set(resumes[-1].superseded) if resumes else set()
    numbered: dict[str, list[tuple[int, Path]]] = {}
    for path in ledger.directory.iterdir():
        if (found := _SUPERSEDED.fullmatch(path.name)) is not None and path.is_file():
            numbered.setdefault(found[1], []).append((int(found[2] or 1), path))
    return [
        path
        for name, paths in sorted(numbered.items())
        for _, path in (sorted(paths)[:-1] if name in newest else sorted(paths))
    ]


KIND = "origin"


def restore_run(reference: str, run: Path) -> PatchFile:
    """Return the new entry in the folder `run`, which must not exist or be empty: the patch that `reference` names.

    What it came from is in the event's field `restored`.

    Raises:
        FileExistsError: there is something in the folder, or another process is writing it; nothing is overwritten.
        FileNotFoundError, EntryError, JournalError: as `read_patch` does; or it is no patch.
        OSError: the disk fails.
    """
    place, there = run / "ledger", run.exists()
    if there and (not run.is_dir() or any(path != unfinished(place) for path in run.iterdir())):
        raise FileExistsError(f"{run}: it exists and is not an empty folder. Nothing was overwritten: name another")
    patch = read_patch(reference)
    metadata = patch.metadata
    check_patch(reference, metadata)
    layer_facts(patch.tensors)  # refuses what is no sidecar's
    where = {key: metadata.get(key) for key in ("kind", "phase", "phase_index", "step")}
    head = None if patch.ledger is None else patch.ledger.journal.head
    source = {"from": reference, "file": patch.path.name, "sha256": patch.sha256, **where, "head": head}
    phase = str(metadata.get("phase", "patch"))
    model = metadata["base"].get("model")
    place_of_base = folder_noted(patch, model) if isinstance(model, str) else None
    base_at = {} if place_of_base is None else {"base_at": place_of_base}
    own = {"kind": KIND, "phase": phase, "phase_index": 0, "step": 0, "parent": patch.sha256, "restored": where}
    # A folder that is there keeps its owner and rights, and may be where a disk is mounted or a shell stands.
    with new_folder(place if there else run, f"--as-new-run {run}") as folder:
        ledger = Ledger(folder if there else folder / place.name)
        path, _ = ledger.record(KIND, 0, phase, 0, patch.tensors, {**metadata, **own}, restored=source, **base_at)
    return Ledger(place, readonly=True).read(path.name)


def is_restored(run: Path) -> bool:
    """Return whether a folder's ledger begins with an origin; only its first line is looked at."""
    journal = run / "ledger" / JOURNAL_NAME
    if not journal.is_file():
        return False
    with journal.open("rb") as file:
        line = file.readline(1 << 20)
    try:
        event = json.loads(line)
    except ValueError:
        return False
    return isinstance(event, dict) and event.get("event") == "entry" and event.get("kind") == KIND


def events_of(origin: PatchFile | None) -> int:
    """Return how many lines of the journal an origin takes; 0 without one."""
    return 0 if origin is None or origin.event is None else origin.event.seq + 1


def origin_of(run: Path) -> PatchFile | None:
    """Return the patch that the run was restored with, checked against its journal; None if it was not restored.

    Raises:
        EntryError, JournalError: the file or the journal is damaged.
    """
    if not is_restored(run):
        return None
    ledger = Ledger(run / "ledger", readonly=True)
    return ledger.read(ledger.entries()[0].name)


def print_verdict(report: VerifyReport, console: Console) -> None:
    """Prints what `verify` found."""
    for problem in report.problems:
        line = Text.assemble(("✗ ", "red"), (problem.where, "bold"), f": {problem.what}\n  {problem.advice}")
        console.print(line, soft_wrap=True)
    hashed = f"{size(report.bytes_hashed)} hashed" if report.hashed else "no file hashed"
    looked_at = f"{report.events} events, {report.entries} entries, {hashed} in {report.directory}"
    if report.ok:
        whole = "every file is as recorded" if report.hashed else "every file is there, with its size"
        verdict = Text.assemble(("✓ ", "green"), f"the chain holds and {whole}: ", looked_at)
        verdict.append(f"\n  head of the journal: {report.head}")
    else:
        verdict = Text.assemble((f"{len(report.problems)} problem(s)", "red"), ": ", looked_at)
    console.print(verdict, soft_wrap=True)
