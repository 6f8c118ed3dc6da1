"""A run's ledger: entry files and the journal that vouches for them, kept in step; and how people name an entry.

    RUN/ledger/journal.jsonl      one `entry` event for each file: its name, sha256, kind, phase, step
    RUN/ledger/*.safetensors      the entries

An entry's file is written first and its journal line second, so a crash between the two leaves an orphan, a file that
nothing vouches for, which `set_aside_orphans` names and sets aside. Removing goes the other way round. People name a
patch as `FILE`, `FOLDER`, `RUN` (its newest commit), `RUN@NAME`, `RUN@good~2` or `RUN@head`. The journal's `base_at`
says whether the base was a folder or a hub's name: what was a folder is never asked of a hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from revpatch.config import SidecarConfig
from revpatch.durable import TEMPORARY_SUFFIX, lock_file, sha256_of_file, sync_directory
from revpatch.ledger.events import BasePlace, EntriesPruned, EntryWritten, Event, RunBegun, RunResumed
from revpatch.ledger.journal import Journal, JournalError
from revpatch.ledger.patch_file import (
    FOLDER_WEIGHTS,
    KINDS,
    OLD_SUFFIX,
    OLD_VERSION,
    SUFFIX,
    EntryError,
    check_kind,
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
    """Return the folder of a run's ledger: `run`/ledger, or `run` itself where it is a ledger, whatever it is
    called."""
    inside = run / "ledger"
    return run if (run / JOURNAL_NAME).is_file() and not (inside / JOURNAL_NAME).is_file() else inside


def run_of(ledger: Path) -> Path:
    """Return the folder of the run that a ledger is of: the one it lies in, or itself where it was copied by itself
    under another name; then there is nothing else of a run in it."""
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
        """Return the entries that are kept, oldest first."""
        return list(self._live.values())

    def newest(self, kind: str | None = None) -> EntryWritten | None:
        """Return the entry recorded last (of `kind`: start, good, rollback, commit); None if there is none.

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
        """Return the `good` entries beyond the newest `keep` of each phase, without those whose names are `spared`."""
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
    """Return a name beside `path` that nothing has yet."""
    aside, number = path.with_name(f"{path.name}.{word}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{word}-{number}")
    return aside


HEAD = "head"
_COUNTED = re.compile(rf"({'|'.join((*KINDS, HEAD))})(?:~(\d+))?")


def read_patch(reference: str | Path) -> PatchFile:
    """Find and read what `reference` names; it is held against the journal beside it, if there is one.

    Raises:
        FileNotFoundError: there is neither such a file nor such a run.
        EntryError: the file is damaged or no patch, or the run has no such entry; the message names those that it has.
        JournalError: the run's journal is damaged, or an earlier version wrote it.
    """
    text = str(reference)
    path = Path(text)
    if (path / FOLDER_WEIGHTS).is_file():
        return _read_file(path / FOLDER_WEIGHTS, text)
    if path.is_file():
        return _read_file(path, text)
    folder, at, name = text.rpartition("@")
    if path.is_dir() or not at:
        folder, name = text, ""
    ledger = _ledger_of(Path(folder), text)
    entry = _newest_commit(ledger, folder) if not name else _entry(ledger, name)
    return ledger.read(entry.name, text)


def _read_file(path: Path, reference: str) -> PatchFile:
    check_kind(path)
    if (path.parent / JOURNAL_NAME).is_file():
        return Ledger(path.parent, readonly=True).read(path.name, reference)
    tensors, metadata = read_entry(path)
    return PatchFile(path, sha256_of_file(path), metadata, tensors, reference)


def _ledger_of(run: Path, reference: str) -> Ledger:
    directory = ledger_of(run)
    if not (directory / JOURNAL_NAME).is_file():
        raise FileNotFoundError(
            f"patch {reference}: expected a patch file ({SUFFIX}), the folder of a run, or RUN@ENTRY, "
            f"{'found a folder without ledger/' + JOURNAL_NAME if run.is_dir() else 'no such file or folder'}; see "
            "`revpatch ledger log RUN` for the entries of a run"
        )
    return Ledger(directory, readonly=True)


def _newest_commit(ledger: Ledger, run: str) -> EntryWritten:
    entry = ledger.newest("commit")
    if entry is None:
        raise EntryError(
            f"{run} has no commit yet: name another entry, as {run}@{HEAD} or {run}@NAME. "
            f"Entries there: {_names(ledger)}"
        )
    return entry


def _entry(ledger: Ledger, name: str) -> EntryWritten:
    if "/" in name or "\\" in name or ".." in name:
        raise EntryError(
            f"@{name}: an entry is named by its file's name alone, without '/' and '..'; nothing outside of "
            f"{ledger.directory} is looked at. Entries there: {_names(ledger)}"
        )
    entries = ledger.entries()
    if (counted := _COUNTED.fullmatch(name)) is not None:
        kind, back = counted[1], int(counted[2] or 0)
        of_kind = [entry for entry in reversed(entries) if kind in (HEAD, entry.kind)]
        if back < len(of_kind):
            return of_kind[back]
        what = "entries" if kind == HEAD else f"{kind} entries"
        raise EntryError(f"@{name}: {ledger.directory} has {len(of_kind)} {what}, and ~{back} asks for one more")
    for entry in entries:
        if name in (entry.name, Path(entry.name).stem):
            return entry
    raise EntryError(f"@{name} is not in {ledger.directory}. Entries there: {_names(ledger)}")


def _names(ledger: Ledger) -> str:
    return ", ".join(entry.name for entry in ledger.entries()) or "none"


LOCK_NAME = ".lock"


def lock_run(run: Path) -> IO[Any] | None:
    """Locks the folder of a run until the returned file is closed; None if another process holds it.

    It holds between processes of one machine, and over a shared folder as far as its file system passes locks on; where
    it has none, a warning says so.
    Raises OSError if the folder can't be written to.
    """
    return lock_file(run / LOCK_NAME)


CONFIG_NAME = "config.yaml"


def place_now(model: str) -> BasePlace:
    """Return what a journal is to say of a base that is being used under this name."""
    return BasePlace(model=model, folder=str(Path(model).absolute()) if Path(model).is_dir() else None)


def folder_noted(patch: PatchFile, model: str) -> BasePlace | None:
    """Return the base's folder as the journal last noted it, whether it is still there or not; of a file without a
    journal, the folder of that name here. None if there is none, or it is a hub's name."""
    place = place_now(model) if patch.ledger is None else _noted(patch, model)
    return None if place is None or place.folder is None else place


def base_place(patch: PatchFile, model: str) -> str:
    """Return what the base of a patch that is called `model` is to be loaded from.

    That is the folder that the journal notes; if it is not there, the folder of that name beside the run as it was
    beside it in training, or here; and the name itself, if nothing says that it was a folder.

    Raises:
        FileNotFoundError: it was a folder, and is in none of these places.
    """
    if Path(model).is_absolute():
        return model
    noted = None if patch.ledger is None else _noted(patch, model)
    folder = None if noted is None else noted.folder
    beside = _project_of(patch)
    places = [Path(folder)] if folder is not None else []
    places += [] if beside is None else [beside / model]
    places.append(Path(model))
    found = next((place for place in places if place.is_dir()), None)
    if found is not None:
        return str(found)
    if folder is None:
        return model
    looked = ", ".join(dict.fromkeys(str(place.absolute()) for place in places))
    raise FileNotFoundError(
        f"base {model}: it was a folder when {patch.path} was made, and is not there any more (looked for {looked}); "
        "the hub was not asked: name the folder with --base (base=)"
    )


def _noted(patch: PatchFile, model: str) -> BasePlace | None:
    """Return the newest note of a base of that name."""
    assert patch.ledger is not None
    for event in reversed(patch.ledger.journal.events(RunBegun, RunResumed, EntryWritten)):
        assert isinstance(event, RunBegun | RunResumed | EntryWritten)
        place = event.base_at
        if place is not None and place.model == model:
            return place
    return None


def _project_of(patch: PatchFile) -> Path | None:
    """Return the folder that paths in the run's config begin at, found by where the run lies and what its config calls
    that place: /here/runs/x whose `output_dir` is runs/x was trained in /here."""
    if patch.ledger is None:
        return None
    run = run_of(patch.ledger.directory).resolve()
    try:
        said = yaml.safe_load((run / CONFIG_NAME).read_text(encoding="utf-8"))["output_dir"]
        own = Path(os.path.normpath(said))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    count = len(own.parts)
    if own.is_absolute() or ".." in own.parts or run.parts[-count:] != own.parts:
        return None
    return Path(*run.parts[:-count])
