"""What a person writes to name a patch, found: `FILE`, `RUN` or `RUN@REF`.

runs/demo/ledger/000_wikitext_commit.pt    a file; where a journal lies beside it, the journal must vouch for it
runs/demo                                  the run's newest commit
runs/demo@000_wikitext_commit              an entry by name, with or without its suffix
runs/demo@good~2                           the third newest entry of a kind: start, good, rollback, commit, origin
runs/demo@head                             the newest entry of any kind; head~1 is the one before
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revpatch.durable import sha256_of_file
from revpatch.ledger.entry import KINDS, SUFFIXES, EntryError, read_entry
from revpatch.ledger.history import JOURNAL_NAME, Ledger, Recorded

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "head"
_COUNTED = re.compile(rf"({'|'.join((*KINDS, HEAD))})(?:~(\d+))?")


@dataclass(frozen=True)
class Located:
    """A patch that was found; `ledger` and `recorded` are None for a file that no journal lies beside."""

    path: Path
    ledger: Ledger | None = None
    recorded: Recorded | None = None

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors (CPU) and metadata, checked as `Ledger.load` and `read_entry` do. Raises EntryError."""
        return read_entry(self.path) if self.ledger is None else self.ledger.load(self.path.name)

    def file_sha256(self) -> str:
        """The sha256 of the file as it is now. Raises OSError."""
        return sha256_of_file(self.path)


def locate(reference: str | Path) -> Located:
    """Finds what `reference` names.

    Raises:
        FileNotFoundError: there is neither such a file nor such a run.
        EntryError: the run has no such entry; the message names those that it has.
        JournalError: the run's journal is damaged.
    """
    text = str(reference)
    path = Path(text)
    if path.is_file():
        return _file(path)
    folder, at, name = text.rpartition("@")
    if path.is_dir() or not at:
        folder, name = text, ""
    ledger = _ledger_of(Path(folder), text)
    entry = _newest_commit(ledger, folder) if not name else _entry(ledger, name)
    return Located(ledger.directory / entry.name, ledger, entry)


def ledger_of(run: Path) -> Path:
    """The folder of a run's ledger: `run`/ledger, or `run` itself where it is a ledger, whatever it is called."""
    inside = run / "ledger"
    return run if (run / JOURNAL_NAME).is_file() and not (inside / JOURNAL_NAME).is_file() else inside


def run_of(ledger: Path) -> Path:
    """The folder of the run that a ledger is of: the one it lies in, or itself where it was copied by itself under
    another name; then there is nothing else of a run in it."""
    ledger = ledger.absolute()
    return ledger.parent if ledger.name == "ledger" else ledger


def _file(path: Path) -> Located:
    if not (path.parent / JOURNAL_NAME).is_file():
        return Located(path)
    ledger = Ledger(path.parent, readonly=True)
    recorded = next((entry for entry in ledger.entries() if entry.name == path.name), None)
    return Located(path, ledger, recorded)


def _ledger_of(run: Path, reference: str) -> Ledger:
    directory = ledger_of(run)
    if not (directory / JOURNAL_NAME).is_file():
        raise FileNotFoundError(
            f"patch {reference}: expected a patch file ({' or '.join(SUFFIXES)}), the folder of a run, or RUN@ENTRY, "
            f"{'found a folder without ledger/' + JOURNAL_NAME if run.is_dir() else 'no such file or folder'}; see "
            "`revpatch ledger log RUN` for the entries of a run"
        )
    return Ledger(directory, readonly=True)


def _newest_commit(ledger: Ledger, run: str) -> Recorded:
    entry = ledger.newest("commit")
    if entry is None:
        raise EntryError(
            f"{run} has no commit yet: name another entry, as {run}@{HEAD} or {run}@NAME. "
            f"Entries there: {_names(ledger)}"
        )
    return entry


def _entry(ledger: Ledger, name: str) -> Recorded:
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
