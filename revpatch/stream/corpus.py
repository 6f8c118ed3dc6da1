"""One or several sets of shards under one numbering of blocks: what a phase trains on.

    set 0: 0 .. n0-1     set 1: n0 .. n0+n1-1     ...

so that the order, the sample that is rehearsed, and reading need to know of one kind of number alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from revpatch.stream.shard_set import ShardSet

Int64s = np.ndarray[Any, np.dtype[np.int64]]


class Corpus:
    """The blocks of all `sets`, one set's after the other's.

    Raises ValueError for no sets, and for sets of different block sizes or tokenizers.
    """

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        if not sets:
            raise ValueError("a corpus needs at least one set of shards")
        for other in sets[1:]:
            check_alike(sets[0], other)
        self.sets = tuple(sets)
        self.block_size = sets[0].block_size
        self._ends = np.cumsum([len(shards) for shards in sets], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def digests(self) -> list[str]:
        """The digest of each set's manifest."""
        return [shards.manifest.digest for shards in self.sets]

    def locate(self, block_ids: np.ndarray[Any, Any]) -> Iterator[tuple[ShardSet, Int64s, Int64s]]:
        """Each set that holds some of these blocks, which of them (rows, (m,) int64), and their numbers in it, (m,).

        Raises IndexError for a number that no block has.
        """
        block_ids = np.asarray(block_ids, dtype=np.int64)
        if len(block_ids) and not 0 <= block_ids.min() <= block_ids.max() < len(self):
            raise IndexError(f"blocks are 0 to {len(self) - 1}, found {block_ids.tolist()}")
        which = np.searchsorted(self._ends, block_ids, side="right")
        for index in np.unique(which).tolist():
            rows = np.flatnonzero(which == index)
            yield self.sets[index], rows, block_ids[rows] - (int(self._ends[index]) - len(self.sets[index]))

    def read(self, block_ids: np.ndarray[Any, Any]) -> Int64s:
        """The tokens of these blocks, (n,) -> (n, block_size) int64, in the order asked for.

        Raises IndexError for a number that no block has and ShardError for a shard that is broken.
        """
        tokens = np.empty((len(block_ids), self.block_size), dtype=np.int64)
        for shards, rows, numbers in self.locate(block_ids):
            tokens[rows] = shards.read(numbers)
        return tokens


def check_alike(one: ShardSet, other: ShardSet) -> None:
    """Raises ValueError if two sets can't be mixed: their blocks differ in size, or another tokenizer made them."""
    mine, theirs = one.manifest, other.manifest
    for what, expected, found in (
        ("block_size", mine.block_size, theirs.block_size),
        ("tokenizer", mine.tokenizer.fingerprint, theirs.tokenizer.fingerprint),
        ("what documents begin with", list(mine.tokenizer.bos_token_ids), list(theirs.tokenizer.bos_token_ids)),
    ):
        if found != expected:
            raise ValueError(
                f"sets of shards differ in {what}: {expected} in {one.location}, {found} in {other.location}; build "
                "them with the same tokenizer and block_size"
            )
