"""A new run that begins with an entry of an old one: a folder with a ledger whose first event is an `origin` entry.

    NEW/ledger/journal.jsonl                line 1: the entry, and `restored`: where it came from
    NEW/ledger/000_wikitext_origin.safetensors       the patch; its parent is the entry it was restored from

NEW appears when it is whole: until then it is `.NEW.unfinished` beside it, or, in a NEW that is there and empty, its
ledger is `NEW/.ledger.unfinished`. What a process that was killed leaves of these goes when NEW is restored again.

`revpatch train CONFIG --set output_dir=NEW` takes it up as the patch that its first phase starts from and is held to.
"""

from __future__ import annotations

import json
from pathlib import Path

from revpatch.durable import new_folder, unfinished
from revpatch.ledger.base_place import folder_noted
from revpatch.ledger.history import JOURNAL_NAME, Ledger, PatchFile
from revpatch.ledger.layers import check_patch, layers_of
from revpatch.ledger.references import read_patch

KIND = "origin"


def restore(reference: str, run: Path) -> PatchFile:
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
    layers_of(patch.tensors)  # refuses what is no sidecar's
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
    """Whether a folder's ledger begins with an origin; only its first line is looked at."""
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
    """The patch that the run was restored with, checked against its journal; None if it was not restored.

    Raises:
        EntryError, JournalError: the file or the journal is damaged.
    """
    if not is_restored(run):
        return None
    ledger = Ledger(run / "ledger", readonly=True)
    return ledger.read(ledger.entries()[0].name)
