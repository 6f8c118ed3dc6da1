"""A set of shards of random tokens, for measurements whose tokens don't matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from revpatch.shards.format import MANIFEST_VERSION, Manifest, ShardWriter, TokenizerInfo


def write_random_set(folder: Path, blocks: int, block_size: int, blocks_per_shard: int, vocabulary: int) -> Manifest:
    """Writes a new folder of `blocks` blocks of uint16 tokens below `vocabulary`, the same at each call."""
    folder.mkdir()
    writer = ShardWriter(folder, "uint16", blocks_per_shard)
    random = np.random.default_rng(0)
    for start in range(0, blocks, 1000):
        size = (min(1000, blocks - start), block_size)
        writer.write(random.integers(0, vocabulary, size=size, dtype=np.uint16))
    manifest = Manifest(
        version=MANIFEST_VERSION,
        split="all",
        block_size=block_size,
        dtype="uint16",
        documents=1,
        empty_documents=0,
        tokens=blocks * block_size,
        dropped_tokens=0,
        blocks=blocks,
        shards=writer.close(),
        tokenizer=TokenizerInfo("random", "0" * 64, vocabulary, 0),
        sources=("random",),
        text_column=None,
        holdout=0.0,
        max_tokens=None,
        licence=None,
        note=None,
    )
    manifest.write(folder)
    return manifest
