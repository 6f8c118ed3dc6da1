"""What of a run's ledger may go, and what must stay.

Only `good` entries go, beyond the newest few of each phase, and the files that earlier resumes set aside. A start, a
commit, an origin or a rejected state never does, nor a `good` entry that something refers to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revpatch.ledger.audit import SNAPSHOTS
from revpatch.ledger.events import RolledBack, RunResumed
from revpatch.ledger.history import JOURNAL_NAME, Ledger, effective, ledger_of, run_of
from revpatch.ledger.journal import JournalError
from revpatch.ledger.patch_file import SUFFIX, read_metadata
from revpatch.ledger.run_lock import lock_run

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
