"""Which block is read when: (sets, weights, seed, step) → blocks. Nothing to remember but the step.

Permutations are keyed and computed where they are asked for: numpy's shuffles differ between versions and need a list,
and what a run has trained on must be told from (seed, step) for as long as the run is kept. `Lanes` walks the epochs of
one set, the same for any number of ranks. `Mixture` numbers the draws, lane i at step k being draw k·lanes + i, and a
periodic pattern in the weights' proportions says which set a draw takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from revpatch.shards.format import Manifest

UInt64s = np.ndarray[Any, np.dtype[np.uint64]]
_ROUNDS = 16  # with 12, ranges of 3 to 7 are seen to be permuted unevenly
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(x: Any) -> UInt64s:
    """splitmix64's finaliser: a bijection of 64-bit integers in which every input bit moves every output bit."""
    x = np.asarray(x, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: UInt64s = x ^ (x >> np.uint64(31))
    return result


def hash64(*words: Any) -> UInt64s:
    """Hash integers, or arrays of them that broadcast, into uint64. Any integers: taken modulo 2^64.

    A bijection in the last word, given the others: block ids under one seed never collide.
    """
    state: UInt64s = np.zeros((), dtype=np.uint64)
    for word in words:
        word = np.uint64(word % 2**64) if isinstance(word, int) else np.asarray(word).astype(np.uint64)
        with np.errstate(over="ignore"):
            state = mix64((state + GOLDEN) ^ word)
    return state


def permute(index: np.ndarray[Any, Any], size: np.ndarray[Any, Any], key: UInt64s) -> np.ndarray[Any, Any]:
    """Return where a keyed permutation of range(size) sends each index, elementwise: (n,) -> (n,) int64.

    A Feistel network on the next power of two above `size`, walked until it lands below `size`. The power is less
    than 2 × size, so that takes 2 rounds on average; time and memory do not depend on `size`.
    """
    assert np.all((index >= 0) & (index < size)), "an index lies outside of its range"
    result = index.astype(np.uint64)
    size = np.broadcast_to(size, index.shape).astype(np.uint64)
    key = np.broadcast_to(key, index.shape)
    assert index.ndim == 1
    todo = np.arange(len(result))
    while len(todo):
        result[todo] = _feistel(result[todo], size[todo], key[todo])
        todo = todo[result[todo] >= size[todo]]
    return result.astype(np.int64)


def _feistel(x: UInt64s, size: UInt64s, key: UInt64s) -> UInt64s:
    # frexp is exact below 2^53: the exponent of size - 1 is its number of bits.
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
    low_bits = bits // np.uint64(2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (bits - low_bits)) - np.uint64(1)
    low, high = x & low_mask, x >> low_bits
    for i in range(_ROUNDS):
        with np.errstate(over="ignore"):
            key = key + GOLDEN
        if i % 2:
            low = low ^ (mix64(key ^ high) & low_mask)
        else:
            high = high ^ (mix64(key ^ low) & high_mask)
    result: UInt64s = (high << low_bits) | low
    return result


ORDER_VERSION = 1  # part of every key: another order is another number here
_CHUNK_LOOKUPS = 2048

Int64s = np.ndarray[Any, np.dtype[np.int64]]


class Lanes:
    """Which block lane i takes at step k. Pure arithmetic: opens no file, knows no rank.

    Args:
        manifest: the set of shards; a block's id is its number in it, over all shards in their order.
        lanes: blocks in a global batch. Never derive it from the number of ranks.
        seed: of the order; each epoch has an order of its own.
        shuffle_blocks: blocks are permuted within windows of at most so many, cut from the permuted shards.
            1 keeps each shard's order.
        repeat: begin the next epoch when one ends.

    Raises ValueError for fewer blocks than lanes and for numbers that make no sense.
    """

    def __init__(self, manifest: Manifest, lanes: int, seed: int, shuffle_blocks: int, repeat: bool) -> None:
        if lanes < 1 or shuffle_blocks < 1:
            raise ValueError(f"lanes is {lanes} and shuffle_blocks is {shuffle_blocks}; both must be at least 1")
        if manifest.blocks < lanes:
            raise ValueError(
                f"the shards hold {manifest.blocks} blocks and there are {lanes} lanes, one block of each a step; "
                f"use at most {manifest.blocks} lanes (batch.new_blocks), a larger corpus, or a smaller block_size"
            )
        self.blocks = manifest.blocks
        self.lanes = lanes
        self.seed = seed
        self.repeat = repeat
        self._windows = -(-self.blocks // shuffle_blocks)
        self._shard_blocks = np.array([shard.blocks for shard in manifest.shards], dtype=np.int64)
        self._shard_starts = np.cumsum(self._shard_blocks) - self._shard_blocks
        self._shard_order: tuple[int, Int64s, Int64s] | None = None
        self._chunk_steps = max(1, _CHUNK_LOOKUPS // lanes)
        self._chunk: tuple[tuple[int, int, int, int], Int64s] | None = None

    @property
    def total_steps(self) -> int | None:
        """Steps until the data end: those of one epoch, or None with `repeat`."""
        return None if self.repeat else self.steps_per_epoch(0)

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Steps of this epoch. They differ by one between epochs, as blocks are carried over."""
        return self.first_step(epoch + 1) - self.first_step(epoch)

    def first_step(self, epoch: int) -> int:
        """Return the step an epoch begins at."""
        return epoch * self.blocks // self.lanes

    def epoch_of(self, step: int) -> int:
        """Return the epoch that this step is in. Raises IndexError outside of the data."""
        if step < 0 or (self.total_steps is not None and step >= self.total_steps):
            raise IndexError(
                f"step {step} is outside of the {self.total_steps or 'endless'} steps that {self.blocks} blocks in "
                f"{self.lanes} lanes give; train fewer steps, or set repeat: true"
            )
        return ((step + 1) * self.lanes - 1) // self.blocks

    def carried(self, epoch: int) -> int:
        """Return how many blocks of the epoch before come first in this one; always fewer than `lanes`."""
        return epoch * self.blocks % self.lanes

    def block_ids(self, step: int, start: int = 0, stop: int | None = None) -> Int64s:
        """Return the blocks that lanes start..stop-1 take at this step, as (stop - start,) int64.

        Raises IndexError for a step outside of the data and ValueError for lanes that are not there.
        """
        stop = self.lanes if stop is None else stop
        if not 0 <= start <= stop <= self.lanes:
            raise ValueError(f"lanes {start} to {stop} were asked for; there are {self.lanes}")
        epoch = self.epoch_of(step)
        chunk, row = divmod(step - self.first_step(epoch), self._chunk_steps)
        key = (epoch, chunk, start, stop)
        cached = self._chunk
        if cached is None or cached[0] != key:
            # Assigned in one go: another thread sees the old pair or the new one.
            cached = self._chunk = (key, self._compute_chunk(epoch, chunk * self._chunk_steps, start, stop))
        blocks: Int64s = cached[1][row].copy()
        return blocks

    def _compute_chunk(self, epoch: int, first: int, start: int, stop: int) -> Int64s:
        """Return the blocks of some steps from the epoch's step `first` on, (steps, stop - start): numpy likes
        company."""
        steps = self.steps_per_epoch(epoch)
        carried = self.carried(epoch)
        k = np.arange(first, min(first + self._chunk_steps, steps), dtype=np.int64)[:, None]
        lane = np.arange(start, stop, dtype=np.int64)
        has_carried = lane < carried
        positions = lane * steps - np.minimum(lane, carried) + k - has_carried
        blocks = self._ordered(epoch, np.maximum(positions, 0).ravel()).reshape(positions.shape)
        if first == 0 and has_carried.any():
            blocks[0, has_carried] = self._ordered(epoch - 1, self.blocks - carried + lane[has_carried])
        return blocks

    def _ordered(self, epoch: int, positions: Int64s) -> Int64s:
        """Return the blocks at these positions of an epoch's order."""
        # Windows of nearly one size: a small last one would hardly be shuffled.
        window = ((positions + 1) * self._windows - 1) // self.blocks
        window_start = window * self.blocks // self._windows
        window_end = (window + 1) * self.blocks // self._windows
        key = hash64(ORDER_VERSION, self.seed, epoch, 1, window)
        shuffled = window_start + permute(positions - window_start, window_end - window_start, key)

        order, ends = self._shards_of(epoch)
        place = np.searchsorted(ends, shuffled, side="right")
        shard = order[place]
        result: Int64s = self._shard_starts[shard] + shuffled - (ends[place] - self._shard_blocks[shard])
        return result

    def _shards_of(self, epoch: int) -> tuple[Int64s, Int64s]:
        """Return the epoch's order of shards, and where each of them ends in it."""
        cached = self._shard_order
        if cached is None or cached[0] != epoch:
            shards = np.arange(len(self._shard_blocks), dtype=np.int64)
            order = np.argsort(hash64(ORDER_VERSION, self.seed, epoch, 0, shards), kind="stable")
            cached = self._shard_order = (epoch, order, np.cumsum(self._shard_blocks[order]))
        return cached[1], cached[2]


_LONGEST_PERIOD = 10_000


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
        """Return the epoch that each set is in when this step ends."""
        drawn = self._drawn(step + 1)
        return [part.epoch_of(max(0, n - 1) // part.lanes) for n, part in zip(drawn, self.parts, strict=True)]

    def block_ids(self, step: int, start: int = 0, stop: int | None = None) -> Int64s:
        """Return the blocks that lanes start..stop-1 take at this step, as (stop - start,) int64.

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
        """Return how many blocks of each set the first `steps` steps take."""
        periods, rest = divmod(steps * self.lanes, len(self._pattern))
        begun = np.bincount(self._pattern[:rest], minlength=len(self._counts))
        drawn: list[int] = (periods * self._counts + begun).tolist()
        return drawn


def _drawn_from(lanes: Lanes, draws: Int64s) -> Int64s:
    """Return the blocks of these draws of one set, (n,) -> (n,): draw n is lane n mod lanes at step n div lanes."""
    steps, lane = np.divmod(draws, lanes.lanes)
    ids = np.empty(len(draws), dtype=np.int64)
    for step in np.unique(steps).tolist():
        rows = steps == step
        ids[rows] = lanes.block_ids(step)[lane[rows]]
    return ids


def _pattern_of(weights: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[Int64s, Int64s]:
    """Return the set of each draw of a period, (period,), and how many draws of that set come before it in the
    period."""
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
