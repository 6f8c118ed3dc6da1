"""The sample of past phases that is replayed, and which block of it is replayed when.

Of all blocks trained on in a phase, keep the k with the smallest hash(seed, block id). That sample is uniform, needs no
coordination, and is the same however the blocks were spread over ranks. At commit it is written as
a small set of shards of its own, so that the corpus need not be there any more to replay it.
Later, which replay block lane i sees at step k is a function of (seed, i, k): nothing to remember here either.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from revpatch.shards.format import (
    DEFAULT_SHARD_BYTES,
    MANIFEST_VERSION,
    Manifest,
    ShardWriter,
    blocks_in,
    install_folder,
    refuse_foreign,
    temporary_folder,
)
from revpatch.shards.mixture import hash64
from revpatch.shards.quarantine import Quarantine
from revpatch.shards.shard_set import Corpus, ShardSet, check_alike

SAMPLE_VERSION = 1  # part of every key, as ORDER_VERSION is in mixture.py
_PRIORITY, _SET, _BLOCK = 0, 1, 2
_COPY_BLOCKS = 1024

Int64s = np.ndarray[Any, np.dtype[np.int64]]


def block_priority(seed: int, block_ids: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return the hash that decides which blocks are kept, (n,) -> (n,) uint64. No two ids collide under one seed."""
    return hash64(SAMPLE_VERSION, _PRIORITY, seed, np.asarray(block_ids, dtype=np.int64))


def bottom_k(seed: int, block_ids: np.ndarray[Any, Any], k: int) -> Int64s:
    """Return the k ids of smallest priority, (n,) -> (min(k, distinct ids),) int64, smallest first.

    An id that was seen several times counts once. Raises ValueError for a negative k.
    """
    if k < 0:
        raise ValueError(f"k is {k}; a sample has 0 or more blocks")
    distinct = np.unique(np.asarray(block_ids, dtype=np.int64))
    kept: Int64s = distinct[np.argsort(block_priority(seed, distinct), kind="stable")[:k]]
    return kept


def write_replay(corpus: Corpus, block_ids: np.ndarray[Any, Any], directory: str | Path, name: str) -> Manifest:
    """Copy these blocks, each once and in the order of their ids, into a set of shards `directory/name`.

    The folder appears when it is whole. One that is there already stays if it is the same and is refused
    (FileExistsError) if not. Raises ValueError for no blocks or a name that is no plain folder name, IndexError for
    ids that the corpus has not, ShardError when a shard is broken.
    """
    if not re.fullmatch(r"\w[\w.\-]*", name):
        raise ValueError(f"replay set name {name!r}: use letters, digits, '_', '-' and '.' alone; it names a folder")
    block_ids = np.unique(np.asarray(block_ids, dtype=np.int64))
    if not len(block_ids):
        raise ValueError(f"replay set {name!r}: there is no block to keep; train at least one step before a commit")
    source = corpus.sets[0].manifest
    folder = Path(directory).resolve() / name
    refuse_foreign(folder)
    temporary = temporary_folder(folder)
    writer = ShardWriter(temporary, source.dtype, blocks_in(DEFAULT_SHARD_BYTES, source.block_bytes), prefix=name)
    try:
        for start in range(0, len(block_ids), _COPY_BLOCKS):
            writer.write(corpus.read(block_ids[start : start + _COPY_BLOCKS]))
        last_id = max(shards.manifest.last_id for shards in corpus.sets)
        manifest = Manifest(
            version=MANIFEST_VERSION,
            split="replay",
            block_size=source.block_size,
            dtype=source.dtype,
            documents=0,  # blocks were drawn, not documents
            empty_documents=0,
            tokens=len(block_ids) * source.block_size,
            dropped_tokens=0,
            blocks=len(block_ids),
            shards=writer.close(),
            tokenizer=source.tokenizer,
            sources=tuple(name for shards in corpus.sets for name in shards.manifest.sources),
            text_column=None,
            holdout=0.0,
            max_tokens=None,
            licence=source.licence,
            highest_id=last_id if last_id + 1 < source.tokenizer.vocab_size else None,
            note=f"{len(block_ids)} of the {len(corpus)} blocks of {', '.join(corpus.digests)}",
        )
        manifest.write(temporary)
        install_folder(temporary, folder, manifest)
        return manifest
    finally:
        writer.abandon()
        shutil.rmtree(temporary, ignore_errors=True)


class ReplayMixture:
    """The replayed blocks of several sets, each set with an equal share in expectation.

    Draws are with replacement: no two of (seed, lane, step) depend on one another, so there is no state.
    Raises ValueError for no sets, or for sets of different block sizes or tokenizers.
    """

    def __init__(self, sets: Sequence[ShardSet], lanes: int, seed: int) -> None:
        if not sets:
            raise ValueError("a replay mixture needs at least one set of shards; name one in replay.base")
        if lanes < 1:
            raise ValueError(f"lanes is {lanes}; replay needs at least 1 (batch.replay_blocks)")
        for other in sets[1:]:
            check_alike(sets[0], other)
        self.sets = tuple(sets)
        self.lanes = lanes
        self.seed = seed
        self._digests = [shard_set.manifest.digest for shard_set in sets]
        self._blocks = np.array([len(shard_set) for shard_set in sets], dtype=np.uint64)

    @property
    def blocks(self) -> dict[str, int]:
        """Blocks of each set, by its digest: the first half of the keys of `read`. Every set is drawn equally often."""
        return dict(zip(self._digests, map(int, self._blocks), strict=True))

    def locate(self, step: int, start: int = 0, stop: int | None = None) -> tuple[Int64s, Int64s]:
        """(index of the set, block id in it) that lanes start..stop-1 replay at this step, (stop - start,) int64.

        Raises ValueError for lanes that are not there and IndexError for a negative step.
        """
        stop = self.lanes if stop is None else stop
        if not 0 <= start <= stop <= self.lanes:
            raise ValueError(f"replay lanes {start} to {stop} were asked for; there are {self.lanes}")
        if step < 0:
            raise IndexError(f"step {step} was asked for; steps count from 0")
        lane = np.arange(start, stop, dtype=np.int64)
        # A modulus prefers small numbers by less than blocks / 2^64, which no run is long enough to see.
        which = hash64(SAMPLE_VERSION, _SET, self.seed, step, lane) % np.uint64(len(self.sets))
        block = hash64(SAMPLE_VERSION, _BLOCK, self.seed, step, lane) % self._blocks[which]
        return which.astype(np.int64), block.astype(np.int64)

    def want(self, step: int, start: int = 0, stop: int | None = None) -> None:
        """Have the shards of the blocks of `locate` fetched in the background."""
        which, block_ids = self.locate(step, start, stop)
        for i in np.unique(which).tolist():
            self.sets[i].want(np.unique(self.sets[i].shards_of(block_ids[which == i])).tolist())

    def read(
        self, step: int, start: int = 0, stop: int | None = None, quarantine: Quarantine | None = None
    ) -> tuple[Int64s, list[tuple[str, int]]]:
        """Return the blocks of `locate`, (stop - start, block_size) int64, and a key for each: (set's digest, block
        id).

        Blocks of shards that are out, in `quarantine`, are replaced. Equal keys mean equal tokens, in any run, so
        that what was computed from a block can be cached under it. Raises ShardError for a broken shard.
        """
        which, block_ids = self.locate(step, start, stop)
        lanes = np.arange(start, start + len(which), dtype=np.int64)
        tokens = np.empty((len(which), self.sets[0].block_size), dtype=np.int64)
        for i in np.unique(which).tolist():
            rows = which == i
            if quarantine is not None:
                block_ids[rows] = quarantine.replace(self.sets[i].manifest, block_ids[rows], step, lanes[rows])
            tokens[rows] = self.sets[i].read(block_ids[rows])
        keys = [(self._digests[i], block) for i, block in zip(map(int, which), map(int, block_ids), strict=True)]
        return tokens, keys
