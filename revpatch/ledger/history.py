"""A run's ledger: entry files and the journal that vouches for them, kept in step.

    RUN/ledger/journal.jsonl      one `entry` event for each file: its name, sha256, kind, phase, step
    RUN/ledger/*.safetensors      the entries

An entry's file is written first and its journal line second, so a crash between the two leaves a file that nothing
vouches for: an orphan, which `set_aside_orphans` names and sets aside. Removing goes the other way round: first the
line, then the file, and it finishes what a crash interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revpatch.config import SidecarConfig
from revpatch.durable import TEMPORARY_SUFFIX, sha256_of_file, sync_directory
from revpatch.ledger.events import EntriesPruned, EntryWritten, Event, RunResumed
from revpatch.ledger.journal import Journal, JournalError
from revpatch.ledger.patch_file import (
    KINDS,
    OLD_SUFFIX,
    OLD_VERSION,
    SUFFIX,
    EntryError,
    entry_name,
    parse_base,
    parse_sidecar,
    read_entry,
    write_entry,
)

if TYPE_CHECKING:
    from torch import Tensor

JOURNAL_NAME = "journal.jsonl"
ENTRY_EVENTS = (EntryWritten, EntriesPruned, RunResumed)
"""The kinds of events that say which entries there are."""


def ledger_of(run: Path) -> Path:
    """The folder of a run's ledger: `run`/ledger, or `run` itself where it is a ledger, whatever it is called."""
    inside = run / "ledger"
    return run if (run / JOURNAL_NAME).is_file() and not (inside / JOURNAL_NAME).is_file() else inside


def run_of(ledger: Path) -> Path:
    """The folder of the run that a ledger is of: the one it lies in, or itself where it was copied by itself under
    another name; then there is nothing else of a run in it."""
    ledger = ledger.absolute()
    return ledger.parent if ledger.name == "ledger" else ledger


def effective(events: Iterable[Event]) -> list[Event]:
    """Return the events that count: without those that a run went back before when it was resumed from a snapshot.

    `events` must have the RunResumed ones among them.
    """
    kept: list[Event] = []
    for event in events:
        if isinstance(event, RunResumed):
            kept = [earlier for earlier in kept if earlier.seq < event.undoes_from]
        kept.append(event)
    return kept


def live_entries(events: Iterable[Event]) -> dict[str, EntryWritten]:
    """Return the entries that should be on disk after these events, by name, oldest first.

    Of `events` those in `ENTRY_EVENTS` are looked at. Raises JournalError for an entry of an earlier version.
    """
    live: dict[str, EntryWritten] = {}
    for event in events:
        if isinstance(event, EntryWritten):
            check_suffix(event.file)
            live.pop(event.file, None)  # recorded again, after a resume: it moves to its new place in time
            live[event.file] = event
        for name in names_gone(event):
            live.pop(name, None)
    return live


def names_gone(event: Event) -> list[str]:
    """Return the entries that an event took away: pruned, or superseded by a resume."""
    if isinstance(event, EntriesPruned):
        return event.files
    return event.superseded if isinstance(event, RunResumed) else []


def check_suffix(name: str) -> None:
    """Raise JournalError, with the version that reads it, if an entry's file is of an earlier version."""
    if name.endswith(OLD_SUFFIX):
        raise JournalError(
            f"{JOURNAL_NAME}: its entries are {OLD_SUFFIX} files ({name}), so revpatch {OLD_VERSION} wrote this run, "
            f"and that version reads it and resumes it: pip install revpatch=={OLD_VERSION}"
        )


def pruned_names(events: Iterable[Event]) -> set[str]:
    """Return every name that was ever pruned."""
    return {name for event in events if isinstance(event, EntriesPruned) for name in event.files}


def stray_files(directory: Path, live: dict[str, EntryWritten]) -> list[Path]:
    """Files in `directory` that no live entry vouches for: orphans, half-written temporary files, half-done prunes."""
    with os.scandir(directory) as found:
        names = [each.name for each in found if each.name.endswith((SUFFIX, TEMPORARY_SUFFIX)) and each.is_file()]
    return [directory / name for name in sorted(names) if name not in live]


@dataclass(frozen=True)
class PatchFile:
    """A patch as it was read from its file."""

    path: Path
    sha256: str
    """Of the file."""
    metadata: dict[str, Any]
    """kind, phase, phase_index, step, parent, base, tokenizer, sidecar, seed, probes, made_by, restored: what was
    known. See docs/LEDGER.md."""
    tensors: dict[str, Tensor]
    """By parameter name, on the CPU."""
    reference: str = ""
    """What a person called it, for messages."""
    ledger: Ledger | None = None
    """The ledger in which it lies; None without a journal."""
    event: EntryWritten | None = None
    """What the journal says of it; None without a journal."""

    @cached_property
    def base(self) -> dict[str, Any]:
        """model, revision, sha256 and dtype of its base; None for what was not known. Raises EntryError where the
        metadata names no base, or says what can't be so."""
        return parse_base(self.reference or str(self.path), self.metadata)

    @cached_property
    def sidecar(self) -> SidecarConfig:
        """The config of its sidecars. Raises EntryError where the metadata has none."""
        return parse_sidecar(self.reference or str(self.path), self.metadata)


class Ledger:
    """The ledger in `directory` (RUN/ledger): opened for writing, or `readonly`, which changes nothing on disk.

    Raises JournalError when the journal is damaged (see `Journal`) or of an earlier version. One process may write;
    call `set_aside_orphans()` before anything else then.
    """

    def __init__(self, directory: Path, readonly: bool = False) -> None:
        self.directory = directory
        self.journal = Journal(directory / JOURNAL_NAME, readonly=readonly)
        self._live = live_entries(self.journal.events(*ENTRY_EVENTS))

    def record(
        self,
        kind: str,
        phase_index: int,
        phase: str,
        step: int,
        tensors: dict[str, Tensor],
        metadata: dict[str, Any],
        **journal_fields: Any,
    ) -> tuple[Path, str]:
        """Writes an entry and journals it, with `journal_fields` (such as the probes' `sets`); returns path, sha256.

        `step` is the optimizer step of the phase at which it was taken (0 for a start), `tensors` the patch (any
        shapes, CPU or GPU), `metadata` plain values. Recording the same content again, as after a resume, is
        fine; raises EntryError for other content under the same name, JournalError for fields that no entry has,
        OSError when the disk fails. Whatever fails, no line vouches for a file that isn't whole.
        """
        numbered = kind in ("good", "rollback")
        name = entry_name(phase_index, phase, kind, step if numbered else None)
        path = self.directory / name
        sha256 = write_entry(path, tensors, metadata)
        event = self.journal.append(
            "entry",
            kind=kind,
            phase=phase,
            phase_index=phase_index,
            step=step,
            file=name,
            sha256=sha256,
            bytes=path.stat().st_size,
            **journal_fields,
        )
        assert isinstance(event, EntryWritten)
        self._live.pop(name, None)
        self._live[name] = event
        return path, sha256

    def entries(self) -> list[EntryWritten]:
        """The entries that are kept, oldest first."""
        return list(self._live.values())

    def newest(self, kind: str | None = None) -> EntryWritten | None:
        """The entry recorded last (of `kind`: start, good, rollback, commit); None if there is none.

        The newest `good` may be of an earlier phase. Raises EntryError for an unknown kind.
        """
        if kind is not None and kind not in KINDS:
            raise EntryError(f"kind {kind!r} is none of {', '.join(KINDS)}")
        return next((entry for entry in reversed(self.entries()) if kind in (None, entry.kind)), None)

    def read(self, name: str, reference: str = "") -> PatchFile:
        """Read an entry, its file checked against the journal's sha256 first. `reference` is what a person called it.

        Raises EntryError for a name that isn't in the journal or was pruned, and as `read_entry` does.
        """
        if name not in self._live:
            gone = name in pruned_names(self.journal.events(EntriesPruned))
            raise EntryError(
                f"{name!r} {'was pruned from' if gone else 'is not in'} {self.directory}. "
                f"Entries there: {', '.join(self._live) or 'none'}"
            )
        event, path = self._live[name], self.directory / name
        tensors, metadata = read_entry(path, event.sha256)
        return PatchFile(path, event.sha256, metadata, tensors, reference or name, self, event)

    def set_aside_orphans(self) -> list[str]:
        """Deals with what a crash left, and returns the names of the files that no journal line vouches for.

        Entry files are renamed to `NAME.orphan` (`.orphan-2`, ...: never over another) and kept; half-written
        temporary files, and files whose pruning was journalled, are deleted. Journals one `orphan` event for each
        file but the pruned. Raises OSError.
        """
        names = []
        pruned = pruned_names(self.journal.events(EntriesPruned))
        for path in stray_files(self.directory, self._live):
            if path.name in pruned:
                path.unlink()
                continue
            names.append(path.name)
            if path.suffix == TEMPORARY_SUFFIX:
                self.journal.append("orphan", file=path.name, moved_to=None, bytes=path.stat().st_size)
                path.unlink()
                continue
            aside = _aside(path, "orphan")
            sha256, size = sha256_of_file(path), path.stat().st_size
            self.journal.append("orphan", file=path.name, moved_to=aside.name, sha256=sha256, bytes=size)
            path.rename(aside)
        sync_directory(self.directory)
        return names

    def resume(self, events: int, **fields: Any) -> list[str]:
        """Goes back to what the ledger was after its first `events` events, as a snapshot noted; returns the names of
        the entries since then, which the run will write anew.

        They are renamed to `NAME.superseded` (`.superseded-2`, ...) and kept. Journals one `resume` event, with
        `fields`.
        Raises OSError.
        """
        names = [entry.name for entry in self.entries() if entry.seq >= events]
        self.journal.append("resume", undoes_from=events, superseded=names, **fields)
        for name in names:
            del self._live[name]
            path = self.directory / name
            path.rename(_aside(path, "superseded"))
        sync_directory(self.directory)
        return names

    def prune_good(self, keep: int) -> list[str]:
        """Removes all but the newest `keep` (at least 1) `good` entries of each phase; returns the names removed.

        Never removes another kind of entry. Journals one `pruned` event with names and bytes freed. Raises ValueError
        for `keep` below 1 (a rollback needs the last good entry), OSError.
        """
        surplus = self.surplus_good(keep)
        self.remove(surplus)
        return [entry.name for entry in surplus]

    def surplus_good(self, keep: int, spared: Collection[str] = ()) -> list[EntryWritten]:
        """The `good` entries beyond the newest `keep` of each phase, without those whose names are `spared`."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1 (got {keep}): a rollback needs the last good entry")
        by_phase: dict[tuple[int, str], list[EntryWritten]] = {}
        for entry in self.entries():
            if entry.kind == "good":
                by_phase.setdefault((entry.phase_index, entry.phase), []).append(entry)
        surplus = [entry for entries in by_phase.values() for entry in entries[:-keep]]
        return [entry for entry in surplus if entry.name not in spared]

    def remove(self, entries: list[EntryWritten], leftovers: list[Path] | None = None) -> int:
        """Removes entries, and files of earlier resumes that no journal line vouches for; returns the bytes freed.

        Journals one `pruned` event, if there is anything to remove. Raises OSError.
        """
        paths = leftovers or []
        freed = sum(entry.bytes for entry in entries) + sum(path.stat().st_size for path in paths)
        if not entries and not paths:
            return 0
        fields = {"leftovers": [path.name for path in paths]} if paths else {}
        self.journal.append("pruned", files=[entry.name for entry in entries], **fields, bytes=freed)
        for entry in entries:
            del self._live[entry.name]
            (self.directory / entry.name).unlink(missing_ok=True)
        for path in paths:
            path.unlink(missing_ok=True)
        sync_directory(self.directory)
        return freed


def _aside(path: Path, word: str) -> Path:
    """A name beside `path` that nothing has yet."""
    aside, number = path.with_name(f"{path.name}.{word}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{word}-{number}")
    return aside
