"""Every corpus after every phase, and what is read off it: average, backward and forward transfer, forgetting.

R[i, j] is minus the held-out loss (nats per token) of set j after phase i; row 0 is what the run begins with: the base,
or the patch that was restored. With T phases committed, and t(j) the phase that teaches set j (1 to T):

    average     mean over j of R[T, j]
    BWT         mean over t(j) < T of R[T, j] − R[t(j), j]          (Lopez-Paz and Ranzato, 2017)
    forgetting  mean over t(j) < T of max over i < T of R[i, j] − R[T, j]     (after Chaudhry et al., 2018)
    FWT         mean over t(j) > 1 of R[t(j) − 1, j] − R[0, j]

Sets that no phase teaches, what the base knew, are not in these means: their change since the base stands for itself.
Differences are taken block by block, so that what makes a block hard cancels; the interval of a mean over sets is that
of Welch and Satterthwaite. That of forgetting takes the best row as given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from revpatch.ledger.events import ProbeReading, Readings
from revpatch.report.history import RunHistory
from revpatch.training.guard import student_t_quantile

Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its interval, which are None where the journal has no losses block by block."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:+.4f} to {self.high:+.4f})"
        return f"{self.value:+.4f}{interval}"


@dataclass(frozen=True)
class Matrix:
    """R, and the losses that it is made of."""

    rows: list[str]
    """"base", or the file of the patch that the run begins with; then the phases that are committed."""
    sets: list[str]
    taught_by: list[int]
    """For each set the row of the phase that teaches it; 0 is none."""
    values: NDArray[np.float64]
    """(rows, sets): R"""
    losses: list[list[Losses | None]]
    """For each row and set the loss of each block, if the journal has it."""
    confidence: float
    base: list[float] | None = None
    """(sets,): R of the bare base, where row 0 is another patch; its losses block by block are not known."""

    @property
    def last(self) -> int:
        """T."""
        return len(self.rows) - 1

    @property
    def shares(self) -> NDArray[np.float64]:
        """(rows, sets): where each value lies from its column's worst, 0, to its best, 1."""
        low, high = np.nanmin(self.values, axis=0), np.nanmax(self.values, axis=0)
        found: NDArray[np.float64] = (self.values - low) / np.maximum(high - low, 1e-9)
        return found

    def difference(self, row: int, earlier: int, column: int) -> Estimate:
        """R[row, column] − R[earlier, column]."""
        return self._mean([(row, earlier, column)])

    def measures(self) -> dict[str, Estimate | None]:
        """Average, BWT, forgetting, FWT and what became of the base's own text; None where no set is of that kind."""
        last, taught = self.last, [(j, t) for j, t in enumerate(self.taught_by) if 0 < t <= self.last]
        past = [(j, t) for j, t in taught if t < last]
        best = {j: int(np.argmax(self.values[:last, j])) for j, _ in past}
        asked: dict[str, list[tuple[int, int | None, int]]] = {
            "average": [(last, None, j) for j, _ in taught],
            "BWT": [(last, t, j) for j, t in past],
            "forgetting": [(best[j], last, j) for j, _ in past],
            "FWT": [(t - 1, 0, j) for j, t in taught if t > 1],
            "base text since the base": [(last, 0, j) for j, t in enumerate(self.taught_by) if t == 0 and last],
        }
        found = {name: self._mean(cells) if cells else None for name, cells in asked.items()}
        if self.base is not None and (old := [j for j, t in enumerate(self.taught_by) if t == 0]):
            since = [self.values[last, j] - self.base[j] for j in old]
            found["base text since the base"] = Estimate(float(np.mean(since)))
        return found

    def _mean(self, cells: Sequence[tuple[int, int | None, int]]) -> Estimate:
        """Mean over sets of R[row, j], less R[earlier, j] where `earlier` is given."""
        value = float(np.mean([self.values[i, j] - (0 if e is None else self.values[e, j]) for i, e, j in cells]))
        squares, freedom = 0.0, 0.0
        for row, earlier, column in cells:
            now, then = self.losses[row][column], None if earlier is None else self.losses[earlier][column]
            if now is None or (earlier is not None and (then is None or then.shape != now.shape)) or now.size < 2:
                return Estimate(value)
            blocks = now if then is None else now - then
            square = float(blocks.var(ddof=1)) / blocks.size
            squares, freedom = squares + square, freedom + square**2 / (blocks.size - 1)
        if not math.isfinite(squares):
            return Estimate(value)
        margin = 0.0
        if squares > 0:
            degrees = max(1, math.floor(squares**2 / freedom))
            margin = student_t_quantile(self.confidence, degrees) * math.sqrt(squares) / len(cells)
        return Estimate(value, value - margin, value + margin)


def matrix_of(run: RunHistory) -> Matrix | None:
    """The matrix of a run; None before its probes were measured first."""
    if not run.phases or not run.phases[0].start:
        return None
    committed, start = run.committed, run.phases[0].start
    of_rows: list[Readings] = [start, *(phase.commit or {} for phase in committed)]
    sets = [name for name in run.taught_by if all(name in row for row in of_rows)]
    return Matrix(
        rows=[run.begins_with, *(phase.name for phase in committed)],
        sets=sets,
        taught_by=[run.taught_by[name] for name in sets],
        values=np.array([[-row[name].loss for name in sets] for row in of_rows], dtype=np.float64),
        losses=[[_blocks(row[name]) for name in sets] for row in of_rows],
        confidence=run.confidence,
        base=None if run.begins_with == "base" else [-_of_the_base(start[name]) for name in sets],
    )


def _of_the_base(reading: ProbeReading) -> float:
    assert reading.base is not None  # the trainer knows it
    return reading.base


def _blocks(reading: ProbeReading) -> Losses | None:
    return None if reading.block_losses is None else np.asarray(reading.block_losses, dtype=np.float64)
