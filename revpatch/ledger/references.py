"""What a person writes to name a patch, found and read: `FILE`, `FOLDER`, `RUN` or `RUN@REF`.

runs/demo/ledger/000_wikitext_commit.safetensors    a file; a journal beside it must vouch for it
my_patch/                                           a folder that save_pretrained wrote
runs/demo                                           the run's newest commit
runs/demo@000_wikitext_commit                       an entry by name, with or without its suffix
runs/demo@good~2                                    the third newest entry of a kind, see `KINDS`
runs/demo@head                                      the newest entry of any kind; head~1 is the one before
"""

from __future__ import annotations

import re
from pathlib import Path

from revpatch.durable import sha256_of_file
from revpatch.ledger.events import EntryWritten
from revpatch.ledger.history import JOURNAL_NAME, Ledger, PatchFile, ledger_of
from revpatch.ledger.patch_file import FOLDER_WEIGHTS, KINDS, SUFFIX, EntryError, check_kind, read_entry

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
