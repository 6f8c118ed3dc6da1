"""What a run that was begun goes on from: a snapshot of the history that its journal tells, or a refusal that says
what would help."""

from __future__ import annotations

import shlex
from pathlib import Path

from revpatch.config import ConfigError
from revpatch.ledger.events import Event, PhaseBegun, RunEnded, RunResumed
from revpatch.ledger.history import JOURNAL_NAME, Ledger, PatchFile, effective
from revpatch.ledger.journal import Journal
from revpatch.ledger.patch_file import EntryError
from revpatch.ledger.restoring import events_of
from revpatch.training.snapshot import ANEW, Snapshot, snapshots_in


def how_anew(directory: Path, origin: PatchFile | None) -> str:
    """What to do where a run can't be gone on with. One that was restored would lose its patch by --fresh."""
    if origin is None:
        return ANEW
    return (
        "or begin another run with the patch that this one began with: `revpatch ledger restore "
        f"{_reference(directory, origin.path.name)} --as-new-run NEW`, then train with --set output_dir=NEW"
    )


def check_history(directory: Path, origin: PatchFile | None, snapshot: Snapshot | None) -> None:
    """Raises ConfigError if a snapshot and the journal are of two histories, or a snapshot is missing."""
    journal = Journal(directory / "ledger" / JOURNAL_NAME)
    events = effective(journal.events(PhaseBegun, RunEnded, RunResumed))
    if snapshot is None and (past := next(filter(_needs_snapshot, events), None)) is not None:
        raise ConfigError(
            f"{directory}: expected a snapshot in snapshot/ to go on from, found none, and line "
            f"{past.seq + 1} of ledger/{JOURNAL_NAME} ({past.event}) was written "
            f"after one: put that folder back, {how_anew(directory, origin)}"
        )
    if snapshot is not None and not _fits(journal, snapshot):
        older = _older(directory, journal, snapshot)
        instead = how_anew(directory, origin)
        if older is not None:
            instead = f"or remove snapshot/{snapshot.name} to go on from {older.name}, {instead}"
        raise ConfigError(
            f"{directory}: snapshot {snapshot.name} was written after {snapshot.events} events of a journal "
            f"whose line {snapshot.events} has sha256 {snapshot.head[:16]}…, and ledger/{JOURNAL_NAME} is not that: "
            f"put back the journal that belongs to it, {instead}"
        )


def check_nothing_made(directory: Path, origin: PatchFile | None, snapshot: Snapshot | None, named: str) -> None:
    """Raises ConfigError if to go on would set aside a patch that was made since by other means than training."""
    made = _made_since(directory, events_of(origin) if snapshot is None else snapshot.events)
    if not made:
        return
    place = "its beginning" if snapshot is None else f"snapshot {snapshot.name}"
    entries = Ledger(directory / "ledger", readonly=True).entries()
    learned = ", ".join(entry.phase for entry in entries if entry.kind == "commit" and entry.name not in made)
    rest = f", without the phases that were committed here ({learned}) and their guard_after" if learned else ""
    raise ConfigError(
        f"{named}: training goes on from {place}, and would set aside {made[-1]}, which was made since by a revert, "
        "merge or import. To train on from it make a new run: `revpatch ledger restore "
        f"{_reference(directory, made[-1])} --as-new-run NEW`, then `revpatch train CONFIG --set output_dir=NEW`{rest}"
    )


def _reference(directory: Path, entry: str) -> str:
    """RUN@ENTRY, as it is typed."""
    return shlex.quote(f"{directory}@{Path(entry).stem}")


def _fits(journal: Journal, snapshot: Snapshot) -> bool:
    return journal.head_after(snapshot.events) == snapshot.head


def _older(directory: Path, journal: Journal, snapshot: Snapshot) -> Snapshot | None:
    """The snapshot that would be gone on from if this one were not there, if that would not be refused too."""
    for path in snapshots_in(directory / "snapshot"):
        if path.name >= snapshot.name:
            continue
        try:
            older = Snapshot.read(path)
        except EntryError:  # it would be passed over
            continue
        except ConfigError:
            return None
        return older if _fits(journal, older) and not _made_since(directory, older.events) else None
    return None


def _made_since(directory: Path, events: int) -> list[str]:
    """The entries after so many events that a revert, merge or import has made, the newest last."""
    entries = Ledger(directory / "ledger", readonly=True).entries()
    return [entry.name for entry in entries if entry.seq >= events and entry.made_by is not None]


def _needs_snapshot(event: Event) -> bool:
    """Return whether a run has written a snapshot before this event, whatever happened."""
    return isinstance(event, RunEnded) or (isinstance(event, PhaseBegun) and event.phase_index > 0)
