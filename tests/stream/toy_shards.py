"""A tiny byte-level tokenizer, documents, manifests without files, and sets of shards with chosen blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from revpatch.stream.manifest import MANIFEST_VERSION, Manifest, Shard, TokenizerInfo
from revpatch.stream.tars import ShardWriter

WORDS = ["the", "patch", "learns", "what", "a", "stream", "brings", "and", "forgets", "little", "of", "it"]


def make_text(i: int) -> str:
    """Document i: a number, so that no two are equal, and some words."""
    generator = np.random.default_rng(i)
    return f"document {i}: " + " ".join(generator.choice(WORDS, size=generator.integers(5, 40)))


def make_tokenizer(vocab_size: int = 300) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_text(i) for i in range(50)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


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
