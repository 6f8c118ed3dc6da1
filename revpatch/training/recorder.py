"""What a forward pass tells of its sidecars: gates, size of the change, statistics of the block outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from revpatch.patch.sidecar import SidecarOutput


class LayerRecorder:
    """Collects, block by block, the gate, the size of the change and, if asked, the output's statistics.

    Args:
        stats_from: keep mean and deviation over time of the outputs of rows from this index on; None keeps none.
    """

    def __init__(self, stats_from: int | None = None) -> None:
        self.stats_from = stats_from
        self.gates: list[Tensor] = []
        self.changes: list[Tensor] = []
        self.stats: list[Tensor] = []

    def measure(self, output: SidecarOutput) -> tuple[Tensor, Tensor]:
        """Mean gate, and mean over tokens of ‖h − u‖²: () and ()."""
        return output.gate.mean(), output.update.square().sum(-1).mean()

    def record(self, layer: int, hidden: Tensor, measured: tuple[Tensor, ...]) -> None:
        """See `Recorder.record`."""
        gate, change = measured
        self.gates.append(gate)
        self.changes.append(change)
        self.record_plain(layer, hidden)

    def record_plain(self, layer: int, hidden: Tensor) -> None:
        """See `Recorder.record_plain`."""
        if self.stats_from is not None:
            states = hidden[self.stats_from :]
            states = states.to(torch.promote_types(states.dtype, torch.float32))
            self.stats.append(torch.stack([states.mean(1), states.std(1, unbiased=False)]))

    def gate_mean(self) -> Tensor:
        """(layers,): mean gate over tokens."""
        return torch.stack(self.gates)

    def change_mean(self) -> Tensor:
        """(layers,): mean over tokens of ‖h − u‖²."""
        return torch.stack(self.changes)


def stats_drift(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over layers and sequences of (‖μ − μ*‖² + ‖σ − σ*‖²)/d; each item is (2, rows, d): μ and σ over time."""
    assert len(student) == len(teacher)
    return torch.stack([(s - t).square().mean(-1).sum(0).mean() for s, t in zip(student, teacher, strict=True)]).mean()
