"""Manifests without files, sets of shards with chosen blocks, and a program that reads a set through a cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from revpatch.shards.format import MANIFEST_VERSION, Manifest, Shard, ShardError, ShardWriter, TokenizerInfo
from revpatch.shards.shard_set import ShardSet

BLOCKS = np.random.default_rng(0).integers(0, 2**16, size=(60, 16))
SHARD_BYTES = 20480
READER = """
import os, sys
import numpy as np
from revpatch.shards.cache import ShardCache
from revpatch.shards.shard_set import ShardSet

url, folder, budget, processes, reads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
children = []
for rank in range(1, processes):  # forked, as importing takes seconds
    children.append(os.fork())
    if not children[-1]:
        break
else:
    rank = 0
random = np.random.default_rng(rank if reads > 2 else 0)
with ShardCache(folder, budget) as cache:
    shards = ShardSet(url, cache)
    for _ in range(reads):
        ids = random.integers(0, len(shards), size=4)
        line = " ".join(map(str, [*ids, *shards.read(ids)[:, 0]]))
        os.write(1, f"{line}\\n".encode())  # in one piece
sys.exit(any(os.waitpid(child, 0)[1] for child in children if rank == 0))
"""


def make_manifest(shard_blocks: list[int], block_size: int = 4) -> Manifest:
    """Return a manifest for arithmetic alone: there are no files behind it."""
    return Manifest(
        version=MANIFEST_VERSION,
        split="all",
        block_size=block_size,
        dtype="uint16",
        documents=1,
        empty_documents=0,
        tokens=sum(shard_blocks) * block_size,
        dropped_tokens=0,
        blocks=sum(shard_blocks),
        shards=tuple(Shard(f"shard-{i:06d}.tar", n, 1, "0" * 64) for i, n in enumerate(shard_blocks)),
        tokenizer=TokenizerInfo("tiny", "0" * 64, 300, 0),
        sources=("some.txt",),
        text_column="text",
        holdout=0.0,
        max_tokens=None,
        licence=None,
        note=None,
    )


def write_blocks(directory: Path, blocks: np.ndarray[Any, Any], blocks_per_shard: int) -> Manifest:
    """Write a real set of shards that holds exactly these blocks, (n, block_size)."""
    directory.mkdir(parents=True)
    writer = ShardWriter(directory, "uint16", blocks_per_shard)
    writer.write(blocks)
    fields = vars(make_manifest([len(blocks)], blocks.shape[1])) | {"shards": writer.close()}
    manifest = Manifest(**fields)
    manifest.write(directory)
    return manifest


def second(folder: Path) -> Path:
    """Return the path of a set's second shard."""
    return folder / Manifest.read(folder).shards[1].name


def tar_of(folder: Path, where: Path, shard: int) -> Path:
    """Return the path of a shard's copy in a cache."""
    return where / f"{Manifest.read(folder).shards[shard].sha256}.tar"


def check_broken(shards: ShardSet, *words: str) -> None:
    """Check that the second shard is named as broken with these words, and that the others are still read."""
    with pytest.raises(ShardError) as caught:
        shards.read(np.array([9, 14]))
    message, fault = str(caught.value), caught.value.fault
    assert fault is not None and fault.shard == 1 and "shard-000001.tar" in fault.location
    assert message.startswith(f"{fault.location}: shard 1 of 6: expected "), message
    for word in words:
        assert word in message, message
    np.testing.assert_array_equal(shards.read(np.array([9, 20])), BLOCKS[[9, 20]])
    with pytest.raises(ShardError, match=re.escape(message)):
        shards.read(np.array([14]))
