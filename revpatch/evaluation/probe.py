"""Held-out losses of the patch that is on the model now, block by block, and the gates on each set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from revpatch.config import ProbeSetConfig
from revpatch.evaluation.guard import Comparison
from revpatch.ledger.events import ProbeReading, Readings
from revpatch.patch.families import head_of
from revpatch.patch.patched_model import recording
from revpatch.shards.shard_set import ShardSet
from revpatch.step.frozen_base import GateRecorder, last_hidden_states
from revpatch.step.head_loss import token_nll
from revpatch.terminal import Far

NEARLY_SHUT = 0.1
_AT_ONCE = 64
"""Blocks."""


@dataclass(frozen=True)
class Measurement:
    """One set, one patch."""

    losses: NDArray[np.float64]
    """(blocks,) float64: mean nats per predicted token of each block."""
    gates: list[float]
    """Mean gate of each sidecar, first block first; empty for the base alone."""
    changes: list[float]
    """Root mean square over tokens of ‖h − u‖, for each sidecar."""
    spreads: list[list[float]] = field(default_factory=list)
    """For each sidecar, the share of tokens whose gate lies in each of equal bins from 0 to 1."""

    @property
    def loss(self) -> float:
        """Mean over blocks."""
        return float(self.losses.mean())

    @property
    def gate(self) -> float:
        """Mean over sidecars."""
        return float(np.mean(self.gates))

    @property
    def patch_norm(self) -> float:
        """Mean over sidecars of the root mean square of ‖h − u‖."""
        return float(np.mean(self.changes))

    @property
    def sparsity(self) -> float | None:
        """Share of tokens whose gate is below `NEARLY_SHUT`, over sidecars; None if it was not measured."""
        if not self.spreads:
            return None
        return float(np.mean([nearly_shut(spread) for spread in self.spreads]))


def nearly_shut(spread: Sequence[float]) -> float:
    """Return the share of tokens whose gate is below `NEARLY_SHUT`, of the shares in equal bins from 0 to 1."""
    return float(np.sum(spread[: round(NEARLY_SHUT * len(spread))]))


def reading_of(
    now: Measurement,
    reference: float,
    start: float,
    tolerance: float,
    compared: Comparison | None,
    **more: float | None,
) -> ProbeReading:
    """Return what the journal keeps of a set.

    Args:
        now: what was measured.
        reference: loss of the last good state, nats per token.
        start: loss at the phase's start.
        tolerance: of the set.
        compared: what the guard made of it; None: the set is not guarded.
        more: fields of the reading that only training knows.
    """
    known = {"loss": now.loss, "reference": reference, "rise": now.loss - reference, "drift": now.loss - start}
    known |= {"tolerance": tolerance, **({} if compared is None else compared.as_fields())}
    own = {"guarded": compared is not None, "gate": now.gate, "patch_norm": now.patch_norm}
    return ProbeReading.model_validate({**known, **own, **more})


class Prober:
    """Measures every probe set; leaves no trace in the model.

    Args:
        base: the patched base model, in eval mode.
        sets: the sets' configs and their shards.
        rows: blocks a forward pass.
        share: (rank, world): measures every world-th block from the rank-th on. A set of fewer blocks than ranks is
            not measured on the ranks that get none of them.
    """

    def __init__(
        self, base: nn.Module, sets: list[tuple[ProbeSetConfig, ShardSet]], rows: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.base, self.rows = base, rows
        rank, world = share
        wanted = {config.name: _spread(len(shards), config.max_blocks) for config, shards in sets}
        ids = {name: every[rank::world] for name, every in wanted.items()}
        self.counts = {name: len(every) for name, every in wanted.items()}
        """Blocks of each set, those of all shares together."""
        self.blocks = {config.name: _read(shards, ids[config.name]) for config, shards in sets if len(ids[config.name])}
        """By set (blocks, block_size), in the shards' own type: as int64 they would take two or four times as much."""

    def measure(self, far: Far = lambda done, total, unit: None) -> dict[str, Measurement]:
        """Return a measurement of each set, by name; `far` is told how many blocks are done, of how many."""
        total, done = sum(len(blocks) for blocks in self.blocks.values()), 0
        measured = {}
        for name, blocks in self.blocks.items():
            measured[name] = self._measure(blocks, done, total, far)
            done += len(blocks)
        return measured

    @torch.no_grad()
    def _measure(self, blocks: NDArray[Any], done: int, total: int, far: Far) -> Measurement:
        device, head = next(self.base.parameters()).device, head_of(self.base).weight
        losses, gates, changes, spreads = [], [], [], []
        for start in range(0, len(blocks), self.rows):
            far(done + start, total, "blocks")
            tokens = torch.from_numpy(blocks[start : start + self.rows].astype(np.int64)).to(device)
            recorder = GateRecorder()
            with recording(self.base, recorder):
                hidden = last_hidden_states(self.base, tokens)
            nll = token_nll(hidden[:, :-1].reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1), head)
            losses.append(nll.view(len(tokens), -1).double().mean(1))
            if recorder.gates:
                gates.append(recorder.gate_mean().double() * len(tokens))
                changes.append(recorder.change_mean().double() * len(tokens))
                spreads.append(recorder.spread().double() * len(tokens))
        if not gates:
            return Measurement(torch.cat(losses).cpu().numpy(), [], [])
        means = (torch.stack(parts).sum(0) / len(blocks) for parts in (gates, changes, spreads))
        gate, change, spread = means
        return Measurement(torch.cat(losses).cpu().numpy(), gate.tolist(), change.sqrt().tolist(), spread.tolist())


def put_together(parts: list[dict[str, Measurement]], counts: dict[str, int]) -> dict[str, Measurement]:
    """Return one measurement of each set from those of the shares of all ranks, in the order of the blocks.

    Args:
        parts: by rank.
        counts: `Prober.counts`.
    """
    whole = {}
    for name, blocks in counts.items():
        losses = np.empty(blocks)
        shares = [(rank, part[name]) for rank, part in enumerate(parts) if name in part]
        for rank, share in shares:
            losses[rank :: len(parts)] = share.losses
        weights = [len(share.losses) / blocks for _, share in shares]

        def mean(values: list[NDArray[np.float64]], weights: list[float] = weights) -> NDArray[np.float64]:
            return np.asarray(sum(weight * value for weight, value in zip(weights, values, strict=True)))

        whole[name] = Measurement(
            losses,
            mean([np.asarray(share.gates) for _, share in shares]).tolist(),
            np.sqrt(mean([np.square(share.changes) for _, share in shares])).tolist(),
            mean([np.asarray(share.spreads) for _, share in shares]).tolist(),
        )
    return whole


def _read(shards: ShardSet, ids: NDArray[np.int64]) -> NDArray[Any]:
    """These blocks, of which only a few at a time are held as `ShardSet.read` gives them."""
    blocks = np.empty((len(ids), shards.block_size), dtype=shards.manifest.dtype)
    for start in range(0, len(ids), _AT_ONCE):
        blocks[start : start + _AT_ONCE] = shards.read(ids[start : start + _AT_ONCE])
    return blocks


def _spread(blocks: int, wanted: int | None) -> NDArray[np.int64]:
    """Ids of `wanted` blocks, evenly spread, so that a small probe still sees many documents."""
    count = blocks if wanted is None else min(wanted, blocks)
    return np.linspace(0, blocks - 1, count).round().astype(np.int64)


def in_words(sets: Readings) -> str:
    """Return each set's loss, and its drift since the phase's start, for a line of the log."""
    return "  ".join(f"{name} {reading.loss:.4f} ({reading.drift:+.4f})" for name, reading in sets.items())
