"""Learning against forgetting: what a cell's measurements say of both, and forgetting at equal learning.

A point is (learned, rise): by how much the loss of the corpora has fallen under the unpatched base's, the mean over
those taught so far, and by how much that of an old set has risen over the unpatched base's; nats per token. A cell's
curve is the line through its checkpoints of one phase. A method's is the lower envelope of its cells' curves and of the
line through their ends, from rate to rate."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from compare_cells import Result

Curve = list[tuple[float, float]]
LAST = -1
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantiles of t by the number of values."""


class Spread(NamedTuple):
    """A mean over seeds and the half width of its 95 % interval; None of a single seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) < 2:
            return cls(values[0], None)
        width = _T95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.mean(values), width)

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")


def phases_of(result: Result) -> int:
    """How many phases a cell had."""
    last: int = max(check["phase"] for check in result["checks"])
    return 1 + last


def end_of(result: Result, phase: int = LAST) -> dict[str, float]:
    """The losses at a phase's end."""
    phase = phase % phases_of(result)
    losses: dict[str, float] = [check["losses"] for check in result["checks"] if check["phase"] == phase][-1]
    return losses


def curve_of(result: Result, corpora: Sequence[str], old: str, phase: int = 0) -> Curve:
    """A cell's points of a phase, from its start on; one that taught all corpora at once has one phase."""
    base = result["checks"][0]["losses"]
    phase = phase % phases_of(result)
    taught = corpora if phases_of(result) == 1 else corpora[: phase + 1]
    of_phase = [check["losses"] for check in result["checks"] if check["phase"] == phase]
    start = base if phase == 0 else end_of(result, phase - 1)
    checks = of_phase if phase == 0 else [start, *of_phase]
    return [
        (statistics.mean(base[name] - losses[name] for name in taught), losses[old] - base[old]) for losses in checks
    ]


def curves_of(results: Iterable[Result], corpora: Sequence[str], old: str, phase: int = 0) -> list[Curve]:
    """The curves of a method's cells of one seed, and the line through their ends in the order of the rates."""
    ordered = sorted((result for result in results if not result["diverged"]), key=lambda result: result["key"]["lr"])
    curves = [curve_of(result, corpora, old, phase) for result in ordered]
    return [*curves, [curve[-1] for curve in curves]] if len(curves) > 1 else curves


def rise_at(curves: Iterable[Curve], learned: float) -> float | None:
    """The lowest rise at which so much was learned; None where none learned exactly so much or passed it."""
    rises = []
    for curve in curves:
        for (x0, y0), (x1, y1) in itertools.pairwise(curve):
            if min(x0, x1) <= learned <= max(x0, x1):
                share = 0.0 if x0 == x1 else (learned - x0) / (x1 - x0)
                rises.append(y0 + share * (y1 - y0))
    return min(rises, default=None)


def most_learned(curves: Iterable[Curve]) -> float:
    """The most that any point has learned."""
    return max(x for curve in curves for x, _ in curve)


def learned_within(curves: Iterable[Curve], rise: float) -> float:
    """The most that was learned where the old set had risen by no more than `rise`."""
    most = 0.0
    for curve in curves:
        for (x0, y0), (x1, y1) in itertools.pairwise(curve):
            for x, y in ((x0, y0), (x1, y1)):
                if y <= rise:
                    most = max(most, x)
            if min(y0, y1) < rise < max(y0, y1):
                most = max(most, x0 + (rise - y0) / (y1 - y0) * (x1 - x0))
    return most


def auc(high: Sequence[float], low: Sequence[float]) -> float:
    """The chance that a value of `high` is above one of `low`, ties counting half."""
    wins = sum((a > b) + 0.5 * (a == b) for a in high for b in low)
    return wins / (len(high) * len(low))
