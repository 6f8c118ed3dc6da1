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
from revpatch.patch.patched_model import Patch, patch_state

SETS = {"base": reading(rise=0.02, low=0.01, high=0.03)}


def a_patch(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"layer_00.gate.weight": torch.full((4,), value)}


@cache
def files_of_a_run() -> dict[str, bytes]:
    """Two phases; the first has four good entries and a rollback. Made once: every event waits for the disk."""
    with tempfile.TemporaryDirectory() as directory:
        ledger = Ledger(Path(directory))
        add(ledger.journal, "run")
        ledger.record("start", 0, "wikitext", 0, a_patch(0), {"phase": "wikitext"})
        for step in (100, 200, 300, 400):
            ledger.record("good", 0, "wikitext", step, a_patch(step), {"step": step}, sets=SETS)
        ledger.record("rollback", 0, "wikitext", 500, a_patch(500), {"step": 500})
        add(
            ledger.journal,
            "rollback",
            phase="wikitext",
            step=500,
            to_file="000_wikitext_good_step000000400.safetensors",
            reason="base rose by 0.1 nats",
            window=[400, 500],
            new_lr_factor=0.5,
        )
        ledger.record("commit", 0, "wikitext", 600, a_patch(600), {"phase": "wikitext"}, sets=SETS)
        ledger.record("start", 1, "imdb", 0, a_patch(600), {"phase": "imdb"})
        ledger.record("good", 1, "imdb", 100, a_patch(700), {"step": 100})
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def a_run(tmp_path: Path) -> tuple[Path, Ledger]:
    run = tmp_path / "runs" / "demo"
    (run / "ledger").mkdir(parents=True)
    for name, data in files_of_a_run().items():
        (run / "ledger" / name).write_bytes(data)
    return run, Ledger(run / "ledger")


# Patches of a base: what is looked at, compared and restored.

SIDECAR = SidecarConfig(bottleneck=4)


def tensors(seed: int, sidecar: SidecarConfig = SIDECAR, width: int = 8, blocks: int = 2) -> dict[str, torch.Tensor]:
    return patch_state(make_it_look_trained(Patch(width, blocks, sidecar), seed))


def metadata(kind: str, step: int, **changes: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"kind": kind, "phase": "wiki", "phase_index": 0, "step": step, "parent": None}
    known |= {"base": BASE, "tokenizer": "t" * 64, "sidecar": SIDECAR.model_dump(mode="json"), "seed": 0}
    return known | changes


def a_trained_run(run: Path) -> Ledger:
    """One phase: a start, five good entries, a rollback to the second of them, a commit."""
    ledger = Ledger(run / "ledger")
    parent = None
    for kind, step in [("start", 0), *(("good", step) for step in (10, 20, 30, 40, 50)), ("commit", 50)]:
        values = tensors(step)
        sets = {"base": reading(3.0 + step / 1000, gate=0.5 + step / 1000)}
        _, parent = ledger.record(kind, 0, "wiki", step, values, metadata(kind, step, parent=parent), sets=sets)
        if step == 20:
            ledger.record("rollback", 0, "wiki", 25, tensors(25), metadata("rollback", 25, parent=parent))
            to_file = "000_wiki_good_step000000020.safetensors"
            add(ledger.journal, "rollback", step=25, to_file=to_file, window=[21, 25])
    return ledger
