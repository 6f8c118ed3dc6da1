"""Looks into a folder of shards: is every byte what the manifest says, and what text is in it."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from revpatch.stream.manifest import Manifest, Shard
from revpatch.stream.shard_set import ShardSet
from revpatch.stream.tars import member_name, stride_of

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
    manifest = Manifest.read(directory)
    first = 0
    for shard in manifest.shards:
        path = directory / shard.name
        try:
            with path.open("rb") as file:
                faults = _faults(file, shard, first, manifest.block_bytes, read or (lambda _: None))
        except OSError as error:
            faults = (f"it can't be read: {error.strerror}",)
        yield ShardReport(path, shard, faults)
        first += shard.blocks


def sample_blocks(directory: Path, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The ids of `count` blocks spread evenly over a set, and their tokens, (count, block_size)."""
    with ShardSet(directory) as shards:
        ids = np.unique(np.linspace(0, len(shards) - 1, count).astype(np.int64))
        return ids, shards.read(ids)


def _faults(file: BinaryIO, shard: Shard, first: int, block_bytes: int, read: Callable[[int], None]) -> tuple[str, ...]:
    """What is wrong with a shard whose first block has the number `first`; it is read once."""
    stride = stride_of(block_bytes)
    end = shard.blocks * stride
    sha256 = hashlib.sha256()
    size = 0
    faults: list[str] = []
    while data := file.read(max(1, _READ_BYTES // stride) * stride):
        for offset in range(0, min(len(data), end - size), stride):
            name = member_name(first + (size + offset) // stride).encode() + b"\0"
            if not faults and not data.startswith(name, offset):
                found = data[offset : offset + len(name) - 1]
                faults.append(f"at byte {size + offset} expected member {name[:-1].decode()}, found {found!r}")
        tail = data[max(0, end - size) :]
        if not faults and tail.strip(b"\0"):
            faults.append(f"after byte {end} expected the tar's end, found more")
        sha256.update(data)
        size += len(data)
        read(len(data))
    if size != shard.bytes:
        faults.insert(0, f"expected {shard.bytes} bytes, found {size}")
    if size < end + 2 * tarfile.BLOCKSIZE:
        faults.append("the tar has no end")
    if sha256.hexdigest() != shard.sha256:
        faults.append(f"expected sha256 {shard.sha256}, found {sha256.hexdigest()}")
    return tuple(faults)
