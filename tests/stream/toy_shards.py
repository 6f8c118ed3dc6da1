"""Manifests without files, and sets of shards with chosen blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from revpatch.shards.format import MANIFEST_VERSION, Manifest, Shard, ShardWriter, TokenizerInfo


def make_manifest(shard_blocks: list[int], block_size: int = 4) -> Manifest:
    """A manifest for arithmetic alone: there are no files behind it."""
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
    """A real set of shards that holds exactly these blocks, (n, block_size)."""
    directory.mkdir(parents=True)
    writer = ShardWriter(directory, "uint16", blocks_per_shard)
    writer.write(blocks)
    fields = vars(make_manifest([len(blocks)], blocks.shape[1])) | {"shards": writer.close()}
    manifest = Manifest(**fields)
    manifest.write(directory)
    return manifest
