"""Runs that are over, made without training: a folder with a ledger as a run leaves it."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from past_events import BASE, add, reading
from toy import make_it_look_trained

from revpatch.config import SidecarConfig
from revpatch.ledger.ledger import Ledger
from revpatch.ledger.patch_file import serialise
from revpatch.patch.patched_model import Patch, patch_state

SETS = {"base": reading(rise=0.02, low=0.01, high=0.03)}
SIDECAR = SidecarConfig(bottleneck=4)
START, COMMIT = "000_wiki_start.safetensors", "000_wiki_commit.safetensors"


def good(step: int) -> str:
    return f"000_wiki_good_step{step:09d}.safetensors"


def tensors(seed: int, sidecar: SidecarConfig = SIDECAR, width: int = 8, blocks: int = 2) -> dict[str, torch.Tensor]:
    return patch_state(make_it_look_trained(Patch(width, blocks, sidecar), seed))


def metadata(kind: str, step: int, **changes: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"kind": kind, "phase": "wiki", "phase_index": 0, "step": step, "parent": None}
    known |= {"base": BASE, "tokenizer": "t" * 64, "sidecar": SIDECAR.model_dump(mode="json"), "seed": 0}
    return known | changes


@cache
def files_of_a_run() -> dict[str, bytes]:
    """One phase: a start, five good entries, a rollback to the second of them, a commit; and the next one's start.
    Made once: every event waits for the disk."""
    with tempfile.TemporaryDirectory() as directory:
        ledger = Ledger(Path(directory))
        parent = None
        for kind, step in [("start", 0), *(("good", step) for step in (10, 20, 30, 40, 50)), ("commit", 50)]:
            sets = {"base": reading(3.0 + step / 1000, gate=0.5 + step / 1000)}
            told = metadata(kind, step, parent=parent)
            _, parent = ledger.record(kind, 0, "wiki", step, tensors(step), told, sets=sets)
            if step == 20:
                ledger.record("rollback", 0, "wiki", 25, tensors(25), metadata("rollback", 25, parent=parent))
                add(ledger.journal, "rollback", step=25, to_file=good(20), window=[21, 25])
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def a_run(run: Path) -> Ledger:
    """Write it into `run`: 8 entries, 9 events; the rollback is line 5."""
    (run / "ledger").mkdir(parents=True)
    for name, data in files_of_a_run().items():
        (run / "ledger" / name).write_bytes(data)
    return Ledger(run / "ledger")


def a_snapshot(run: Path, **more: Any) -> Path:
    """Write what a snapshot notes of the journal as it is now."""
    (run / "snapshot").mkdir(exist_ok=True)
    journal, path = Ledger(run / "ledger", readonly=True).journal, run / "snapshot/step000000000030.safetensors"
    noted = {"events": len(journal.records()), "head": journal.head, **more}
    path.write_bytes(serialise({"w": torch.zeros(1)}, noted))
    return path


def contents(folder: Path) -> dict[Path, bytes]:
    """Return all files, without locks."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
