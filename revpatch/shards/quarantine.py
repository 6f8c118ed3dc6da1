"""Broken shards that were taken out, each from a step on, and what is read in their place.

The order of the blocks stays as it is. Where it leads to a block of a shard that is out, another block of the same
set is drawn by a hash of (step, lane): no lane gets shorter, the rest of the order is used as before, and which
blocks a step has is still a function of the seed, the step and this list, for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from revpatch.shards.format import Manifest, ShardError, ShardFault
from revpatch.shards.mixture import hash64
from revpatch.shards.shard_set import Corpus

_VERSION = 1

Int64s = np.ndarray[Any, np.dtype[np.int64]]


class Quarantine:
    """The shards that are out.

    Args:
        seed: of the run; it decides what is read instead.
        broken: those known already, as when a run is resumed.
    """

    def __init__(self, seed: int, broken: Iterable[ShardFault] = ()) -> None:
        self.seed = seed
        self.broken: list[ShardFault] = list(broken)

    def add(self, broken: ShardFault) -> bool:
        """Takes a shard out; false if it was out already."""
        known = any((b.digest, b.shard) == (broken.digest, broken.shard) for b in self.broken)
        if not known:
            self.broken.append(broken)
        return not known

    def out(self, digest: str, step: int | None = None) -> Int64s:
        """Return the shards of a set that are out at a step of the run, or now."""
        shards = (b.shard for b in self.broken if b.digest == digest and (step is None or (b.since or 0) <= step))
        return np.array(sorted(shards), dtype=np.int64)

    def sound(self, manifest: Manifest, numbers: Int64s) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which of these blocks of a set are in no shard that is out now, (n,) -> (n,)."""
        return ~np.isin(manifest.shards_of(numbers), self.out(manifest.digest))

    def replace(self, manifest: Manifest, numbers: Int64s, step: int, lanes: Int64s) -> Int64s:
        """Return the blocks to read at a step of the run instead of these of one set, (n,) -> (n,); most are the same.

        `lanes` (n,) says whose each block is. Raises ShardError when no shard of the set is left.
        """
        out = self.out(manifest.digest, step) if self.broken else ()
        if not len(out):
            return numbers
        if len(out) == len(manifest.shards):
            last = next(b for b in reversed(self.broken) if b.digest == manifest.digest)
            raise ShardError(
                f"every one of the {len(manifest.shards)} shards of this set is broken, the last of them being "
                f"{last.location}: {last.reason}",
                last,
            )
        numbers = numbers.copy()
        attempt = 0
        while len(todo := np.flatnonzero(np.isin(manifest.shards_of(numbers), out))):
            drawn = hash64(_VERSION, self.seed, step, lanes[todo], attempt) % np.uint64(manifest.blocks)
            numbers[todo] = drawn.astype(np.int64)
            attempt += 1
        return numbers

    def replace_in(self, corpus: Corpus, block_ids: Int64s, step: int, lanes: Int64s) -> Int64s:
        """`replace`, for numbers over all sets of a corpus."""
        if not self.broken:
            return block_ids
        replaced = block_ids.copy()
        for shards, rows, numbers in corpus.locate(block_ids):
            instead = self.replace(shards.manifest, numbers, step, lanes[rows])
            replaced[rows] += instead - numbers
        return replaced
