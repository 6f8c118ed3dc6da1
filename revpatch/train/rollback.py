"""The good state, and the transaction that brings every rank back to it.

All ranks receive rank 0's copy, write masters, moments, step count and parameters, hash what they then hold, and stop
if any two hashes differ.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from torch import Tensor

from revpatch.distributed.ranks import Ranks
from revpatch.evaluation.guard import Comparison
from revpatch.evaluation.probe import Measurement
from revpatch.patch.patched_model import Patch
from revpatch.step.engine import Engine, EngineState


@dataclass
class GoodState:
    """A state worth returning to. Ranks other than 0 hold no measurements."""

    step: int
    """Optimizer steps of the phase when it was taken."""
    engine: EngineState
    measurements: dict[str, Measurement] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    """Of the guarded sets, against the phase's start."""
    entry: str = ""
    """Its file in the ledger."""
    sha256: str | None = None
    """The file's sha256."""


def state_sha256(patch: Patch, state: EngineState) -> str:
    """Return the sha256 of the module's parameters and of the whole optimizer state."""
    digest = hashlib.sha256(f"step {state.step}\n".encode())
    parameters: dict[str, Tensor] = patch.state_dict()  # with the channels' sizes, which the optimizer doesn't hold
    parts: dict[str, dict[str, Tensor]] = {"parameter": parameters, "master": state.master, **state.moments}
    for kind, tensors in parts.items():
        for name in sorted(tensors):
            digest.update(f"{kind} {name} {tuple(tensors[name].shape)}\n".encode())
            digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def restore_state(engine: Engine, patch: Patch, state: EngineState | None, peers: Ranks) -> str:
    """Loads rank 0's `state` on every rank and returns the hash that all agree on; the other ranks pass None or theirs.

    Raises:
        RuntimeError: two ranks hold different states afterwards; the message has every rank's hash.
    """
    received = peers.from_rank0(state if peers.rank == 0 else None)
    assert received is not None
    engine.load(received)
    hashes = peers.gather(state_sha256(patch, engine.state()))
    if len(set(hashes)) > 1:
        held = "; ".join(f"rank {rank} holds {sha256}" for rank, sha256 in enumerate(hashes))
        raise RuntimeError(
            f"the ranks disagree after loading one state: {held}. Training on would mix two patches, so the run "
            "stops here; its ledger is whole. Check the memory and the network of the ranks that differ"
        )
    return hashes[0]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().numpy().reshape(-1).data
