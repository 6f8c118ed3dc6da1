"""Looks into a folder of shards: is every byte what the manifest says, and what text is in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from revpatch.stream.manifest import Manifest, Shard
from revpatch.stream.placed_shard import PlacedShard, place
from revpatch.stream.shard_set import ShardSet

_READ_BYTES = 2**22


@dataclass(frozen=True)
class ShardReport:
    """One shard that was read whole; `faults` says what is wrong with it, in words, and is empty for a sound one."""

    path: Path
    shard: Shard
    faults: tuple[str, ...]


def verify_shards(directory: Path, read: Callable[[int], None] | None = None) -> Iterator[ShardReport]:
    """Read and hash every shard of a folder, in order; `read` is told how many bytes each time.

    Raises FileNotFoundError when there is no manifest and ValueError when that is not sound.
    """
    for placed in place(str(directory), Manifest.read(directory)):
        path = Path(placed.location)
        try:
            with path.open("rb") as file:
                faults = _faults(file, placed, read or (lambda _: None))
        except OSError as error:
            faults = (f"it can't be read: {error.strerror}",)
        yield ShardReport(path, placed.shard, faults)


def sample_blocks(directory: Path, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The ids of `count` blocks spread evenly over a set, and their tokens, (count, block_size)."""
    with ShardSet(directory) as shards:
        ids = np.unique(np.linspace(0, len(shards) - 1, count).astype(np.int64))
        return ids, shards.read(ids)


def _faults(file: BinaryIO, placed: PlacedShard, read: Callable[[int], None]) -> tuple[str, ...]:
    """What is wrong with a shard."""
    shard, sha256, size = placed.shard, hashlib.sha256(), 0
    while data := file.read(_READ_BYTES):
        sha256.update(data)
        size += len(data)
        read(len(data))
    faults = []
    if size != shard.bytes:
        faults.append(f"expected {shard.bytes} bytes, found {size}")
    if sha256.hexdigest() != shard.sha256:
        faults.append(f"expected sha256 {shard.sha256}, found {sha256.hexdigest()}")
    if faults:
        faults.append(placed.damage(file.fileno(), size)[1])
    elif found := placed.first_difference(file.fileno(), size):  # the manifest itself is wrong about it
        faults.append(found[1])
    return tuple(faults)
