"""(sets, weights, seed, step) → blocks: the lanes of one set, or of several in fixed proportions.

Draws are numbered: lane i at step k is draw k·lanes + i. A periodic pattern says which set a draw takes, in the
weights' proportions and evenly spread; counting in it says the how-manieth draw of its set that is, and the set's own
`Lanes` say which block. So every set goes through its own epochs, each block of it once an epoch, and the place in
all of them is still nothing but the step. With one set this is `Lanes` itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from revpatch.stream.lanes import Lanes
from revpatch.stream.manifest import Manifest
from revpatch.stream.permutation import GOLDEN

_LONGEST_PERIOD = 10_000

Int64s = np.ndarray[Any, np.dtype[np.int64]]


class Mixture:
    """Which block lane i takes at step k, as numbers over all sets, one set's blocks after the other's.

    Pure arithmetic: opens no file, knows no rank.

    Args:
        manifests: of the sets.
        weights: shares of the draws, relative to one another; kept to 1 in 10,000 and exactly if they are as simple
            as 2 : 1.
        lanes, seed, shuffle_blocks, repeat: as in `Lanes`.

    Raises ValueError as `Lanes` does, and for a weight of which not one in 10,000 draws would be left.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        weights: Sequence[float],
        lanes: int,
        seed: int,
        shuffle_blocks: int,
        repeat: bool,
    ) -> None:
        self.lanes = lanes
        self.repeat = repeat
        self._pattern, self._before = _pattern_of(np.asarray(weights, dtype=np.float64))
        counts = np.bincount(self._pattern, minlength=len(manifests))
        blocks = np.array([manifest.blocks for manifest in manifests], dtype=np.int64)
        self._starts = np.cumsum(blocks) - blocks
        self._counts = counts
        # A set's draws of one step come from as many lanes of its own, so that each walks on where it was.
        self.parts = [
            Lanes(
                manifest,
                lanes if len(manifests) == 1 else max(1, min(manifest.blocks, round(lanes * count / counts.sum()))),
                seed + index * int(GOLDEN),
                shuffle_blocks,
                repeat,
            )
            for index, (manifest, count) in enumerate(zip(manifests, counts.tolist(), strict=True))
        ]

    @property
    def total_steps(self) -> int | None:
        """Steps until the first of the sets ends, or None with `repeat`."""
        if self.repeat:
            return None
        ends = [part.first_step(1) * part.lanes for part in self.parts]
        low, high = 0, sum(ends) // self.lanes + 1
        while high - low > 1:  # the largest number of steps that asks no set for more than it has
            middle = (low + high) // 2
            fits = all(drawn <= end for drawn, end in zip(self._drawn(middle), ends, strict=True))
            low, high = (middle, high) if fits else (low, middle)
        return low

    def epochs(self, step: int) -> list[int]:
        """The epoch that each set is in when this step ends."""
        drawn = self._drawn(step + 1)
        return [part.epoch_of(max(0, n - 1) // part.lanes) for n, part in zip(drawn, self.parts, strict=True)]

    def block_ids(self, step: int, start: int = 0, stop: int | None = None) -> Int64s:
        """The blocks that lanes start..stop-1 take at this step, as (stop - start,) int64.

        Raises IndexError for a step outside of the data and ValueError for lanes that are not there.
        """
        stop = self.lanes if stop is None else stop
        if len(self.parts) == 1:
            return self.parts[0].block_ids(step, start, stop)
        if not 0 <= start <= stop <= self.lanes:
            raise ValueError(f"lanes {start} to {stop} were asked for; there are {self.lanes}")
        if step < 0:
            raise IndexError(f"step {step} was asked for; steps count from 0")
        periods, places = np.divmod(step * self.lanes + np.arange(start, stop, dtype=np.int64), len(self._pattern))
        which = self._pattern[places]
        draws = periods * self._counts[which] + self._before[places]
        ids = np.empty(stop - start, dtype=np.int64)
        for index in np.unique(which).tolist():
            rows = np.flatnonzero(which == index)
            ids[rows] = self._starts[index] + _drawn_from(self.parts[index], draws[rows])
        return ids

    def _drawn(self, steps: int) -> list[int]:
        """How many blocks of each set the first `steps` steps take."""
        periods, rest = divmod(steps * self.lanes, len(self._pattern))
        begun = np.bincount(self._pattern[:rest], minlength=len(self._counts))
        drawn: list[int] = (periods * self._counts + begun).tolist()
        return drawn


def _drawn_from(lanes: Lanes, draws: Int64s) -> Int64s:
    """The blocks of these draws of one set, (n,) -> (n,): draw n is lane n mod lanes at step n div lanes."""
    steps, lane = np.divmod(draws, lanes.lanes)
    ids = np.empty(len(draws), dtype=np.int64)
    for step in np.unique(steps).tolist():
        rows = steps == step
        ids[rows] = lanes.block_ids(step)[lane[rows]]
    return ids


def _pattern_of(weights: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[Int64s, Int64s]:
    """The set of each draw of a period, (period,), and how many draws of that set come before it in the period."""
    shares = weights / weights.sum()
    periods = np.arange(1, _LONGEST_PERIOD + 1)[:, None] * shares
    exact = np.flatnonzero(np.abs(periods - periods.round()).max(axis=1) < 1e-9)
    period = int(exact[0]) + 1 if len(exact) else _LONGEST_PERIOD
    counts = np.floor(period * shares + 1e-9).astype(np.int64)
    left_over = np.argsort(counts - period * shares, kind="stable")[: period - int(counts.sum())]
    counts[left_over] += 1
    if counts.min() < 1:
        small = int(counts.argmin())
        raise ValueError(
            f"weight {weights[small]:g} of {weights.sum():g} is less than one draw in {_LONGEST_PERIOD}; raise it, or "
            "leave the set out"
        )
    which = np.repeat(np.arange(len(counts)), counts)
    nth = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((nth + 0.5) / counts[which], kind="stable")
    return which[order], nth[order]
