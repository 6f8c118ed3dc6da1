"""A patch that was made and not trained, written into a ledger: a commit with its parents and how it was made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from revpatch.config_file import load_config
from revpatch.ledger.base_place import folder_noted
from revpatch.ledger.events import EntryWritten, Readings
from revpatch.ledger.history import JOURNAL_NAME, Ledger, PatchFile
from revpatch.ledger.run_lock import LOCK_NAME
from revpatch.surgery.arithmetic import Tensors
from revpatch.surgery.judgement import Judgement
from revpatch.training.resume import CONFIG_NAME, claim

_KEPT = ("base", "tokenizer", "sidecar", "seed")
"""What a made patch says of itself as the one it was made of did."""


@dataclass(frozen=True)
class Made:
    """What came of an operation. `name` and `sha256` are None if nothing was written, and `reason` says why."""

    run: str
    made_by: dict[str, Any]
    agrees: bool
    reason: str
    sets: Readings = field(default_factory=dict)
    name: str | None = None
    sha256: str | None = None

    def as_fields(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@contextmanager
def claimed(run: Path, create: bool = False) -> Iterator[Ledger]:
    """The run's ledger, opened for writing while no other process may write to the run.

    Args:
        run: its folder.
        create: a folder that is not there becomes one with a ledger alone.

    Raises:
        FileExistsError, FileNotFoundError: the folder is no run, and none can be made of it.
        ConfigError: another process writes there. JournalError: its journal is damaged.
    """
    if not (run / "ledger" / JOURNAL_NAME).is_file():
        if not create:
            raise FileNotFoundError(f"{run}: expected the folder of a run, found none with ledger/{JOURNAL_NAME} in it")
        if run.exists() and (not run.is_dir() or {path.name for path in run.iterdir()} - {LOCK_NAME, "ledger"}):
            raise FileExistsError(
                f"{run}: it exists and is no run. Nothing was overwritten: name a run, or a folder that is not there"
            )
        run.mkdir(parents=True, exist_ok=True)  # a command that was killed may have left it, without a journal
    lock = claim(run, str(run))
    try:
        ledger = Ledger(run / "ledger")
        ledger.set_aside_orphans()  # a command that was killed between file and journal left one of this very name
        yield ledger
    finally:
        lock.close()


def write(
    ledger: Ledger,
    name: str,
    tensors: Tensors,
    of: PatchFile,
    made_by: dict[str, Any],
    judgement: Judgement | None,
    force: bool = False,
) -> Made:
    """Records the patch as the newest commit, if the judgement agrees or `force` is given.

    Args:
        ledger: open for writing.
        name: what stands in the place of a phase's name, as in `002_NAME_commit.safetensors`.
        tensors: the new patch, all of it finite (see `check_finite`).
        of: the entry that it descends from, and whose base, tokenizer and sidecar it has.
        made_by: the operation and the sha256 of all that went into it.
        judgement: the verdict; None if nothing was probed.
        force: write against the verdict; the entry then says so.

    Raises:
        ValueError: the name can't be part of a file's.
    """
    run = ledger.directory.parent
    agrees, reason, sets = (True, "", {}) if judgement is None else (judgement.agrees, judgement.reason, judgement.sets)
    if not agrees and not force:
        return Made(str(run), made_by, agrees, reason, sets)
    if not agrees:
        made_by = {**made_by, "forced": reason}
    index = _next_index(ledger)
    kept: dict[str, Any] = {key: of.metadata[key] for key in _KEPT if key in of.metadata}
    metadata: dict[str, Any] = {
        "kind": "commit",
        "phase": name,
        "phase_index": index,
        "step": 0,
        "parent": of.sha256,
        **kept,
        "probes": {key: reading.loss for key, reading in sets.items()},
        "made_by": made_by,
    }
    known: dict[str, Any] = {"sets": sets, "made_by": made_by}
    model = of.base["model"]
    if model is not None and (place := folder_noted(of, model)) is not None:  # a new folder's journal says it too
        known["base_at"] = place
    path, sha256 = ledger.record("commit", index, name, 0, tensors, metadata, **known)
    return Made(str(run), made_by, agrees, reason, sets, path.name, sha256)


def _next_index(ledger: Ledger) -> int:
    """Above that of every entry there ever was, and of every phase that the run's config has."""
    used = [entry.phase_index for entry in ledger.journal.events(EntryWritten)]
    file = ledger.directory.parent / CONFIG_NAME
    phases = len(load_config(file).phases) if file.is_file() else 0
    return max([phases, *(index + 1 for index in used)])
