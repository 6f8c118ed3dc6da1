"""What a forward pass tells of its sidecars: gates, size of the change, statistics of the block outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from revpatch.patch.sidecar import SidecarOutput

GATE_BINS = 20


class LayerRecorder:
    """Collects, block by block, the gate, the size of the change and, if asked, the output's statistics.

    Args:
        stats_from: keep mean and deviation over time of the outputs of rows from this index on; None keeps none.
        gate_learns, change_learns: whether a gradient will be asked of the gate, and of the change. What is recomputed
            in the backward pass and has an output of which none is asked is never freed by torch (2.13).
    """

    def __init__(self, stats_from: int | None = None, gate_learns: bool = False, change_learns: bool = False) -> None:
        self.stats_from = stats_from
        self.gate_learns, self.change_learns = gate_learns, change_learns
        self.gates: list[Tensor] = []
        self.changes: list[Tensor] = []
        self.stats: list[Tensor] = []

    def measure(self, output: SidecarOutput) -> tuple[Tensor, ...]:
        """Mean gate, and mean over tokens of ‖h − u‖²: () and ()."""
        gate = output.gate if self.gate_learns else output.gate.detach()
        update = output.update if self.change_learns else output.update.detach()
        return gate.mean(), update.square().sum(-1).mean()

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


class GateRecorder(LayerRecorder):
    """Keeps besides how each layer's gates are spread over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.spreads: list[Tensor] = []

    def measure(self, output: SidecarOutput) -> tuple[Tensor, ...]:
        """Of `LayerRecorder`, and the share of gates in each of `GATE_BINS` equal bins from 0 to 1: (GATE_BINS,)."""
        counts = torch.histc(output.gate.float(), GATE_BINS, 0.0, 1.0)
        return *super().measure(output), counts / output.gate.numel()

    def record(self, layer: int, hidden: Tensor, measured: tuple[Tensor, ...]) -> None:
        """See `Recorder.record`."""
        *others, spread = measured
        self.spreads.append(spread)
        super().record(layer, hidden, tuple(others))

    def spread(self) -> Tensor:
        """(layers, GATE_BINS): each layer's shares."""
        return torch.stack(self.spreads)


def stats_drift(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over layers and sequences of (‖μ − μ*‖² + ‖σ − σ*‖²)/d; each item is (2, rows, d): μ and σ over time."""
    assert len(student) == len(teacher)
    return torch.stack([(s - t).square().mean(-1).sum(0).mean() for s, t in zip(student, teacher, strict=True)]).mean()
