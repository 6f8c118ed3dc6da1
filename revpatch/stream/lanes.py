"""(manifest, seed, step) → blocks. Exact, elastic, and nothing to remember but the step.

An epoch's order is a seeded permutation of the shards and then, within windows of `shuffle_blocks`, of the blocks.
Both are computed where they are asked for, by a keyed permutation of integers, so a lookup costs the same at any
step and no list as long as the corpus exists. With B blocks, L lanes and c blocks carried over from the epoch before:

    order:    | lane c | lane c+1 | ... | lane L-1 |  ... every lane walks a contiguous part, one block a step
    step 0:   lanes 0..c-1 take the carried blocks first, so their parts of the order are one block shorter
    the end:  the last (c + B) mod L blocks of the order are carried into the next epoch

All lanes have the same number of steps, and a rank reads some of them: which ranks there are changes nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from revpatch.stream.manifest import Manifest
from revpatch.stream.permutation import hash64, permute

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
        repeat: go on with the next epoch when one ends.

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
        """The step an epoch begins at."""
        return epoch * self.blocks // self.lanes

    def epoch_of(self, step: int) -> int:
        """The epoch that this step is in. Raises IndexError outside of the data."""
        if step < 0 or (self.total_steps is not None and step >= self.total_steps):
            raise IndexError(
                f"step {step} is outside of the {self.total_steps or 'endless'} steps that {self.blocks} blocks in "
                f"{self.lanes} lanes give; train fewer steps, or set repeat: true"
            )
        return ((step + 1) * self.lanes - 1) // self.blocks

    def carried(self, epoch: int) -> int:
        """How many blocks of the epoch before come first in this one; always fewer than `lanes`."""
        return epoch * self.blocks % self.lanes

    def block_ids(self, step: int, start: int = 0, stop: int | None = None) -> Int64s:
        """The blocks that lanes start..stop-1 take at this step, as (stop - start,) int64.

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
        """The blocks of some steps from the epoch's step `first` on, (steps, stop - start): numpy likes company."""
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
        """The blocks at these positions of an epoch's order."""
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
        """The epoch's order of shards, and where each of them ends in it."""
        cached = self._shard_order
        if cached is None or cached[0] != epoch:
            shards = np.arange(len(self._shard_blocks), dtype=np.int64)
            order = np.argsort(hash64(ORDER_VERSION, self.seed, epoch, 0, shards), kind="stable")
            cached = self._shard_order = (epoch, order, np.cumsum(self._shard_blocks[order]))
        return cached[1], cached[2]
