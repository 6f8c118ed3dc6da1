"""Text that the base writes by itself, to be replayed and held out where a run names no text that the base knows.

    data/built/own-gpt2-5d0b7c1e9f24           the blocks that are replayed, shards like any other
    data/built/own-gpt2-5d0b7c1e9f24_probe     those that are held out

Of text that was drawn from the base itself no other model has a lower loss, in expectation: a rise of the loss on it
is forgetting. The folder's name has a hash of all that decides what is in it, so that all runs of a base share it.

Each block is drawn token by token from the base's own distribution, at temperature 1 and without truncation, and goes
on after an end-of-text token, as packed text does. Half of the blocks begin where a document begins, and half with an
ordinary token that is drawn evenly from the vocabulary: text about what documents seldom begin with.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from revpatch.config import SELF, Config, ConfigError
from revpatch.corpus.tokenizer import read_tokenizer, tokenizer_info
from revpatch.distributed.ranks import Ranks
from revpatch.shards.format import (
    DEFAULT_SHARD_BYTES,
    MANIFEST_NAME,
    MANIFEST_VERSION,
    Manifest,
    ShardWriter,
    TokenizerInfo,
    blocks_in,
    install_folder,
    refuse_foreign,
    temporary_folder,
)
from revpatch.shards.mixture import hash64
from revpatch.shards.shard_set import ShardSet
from revpatch.terminal import Far, doing, say
from revpatch.train.startup import BaseWeights

RECIPE_VERSION = 1  # part of the folder's name and of every seed
BATCH_BLOCKS, BATCH_TOKENS = 32, 2**15
"""At most so many blocks are written at once, and so many tokens, or one block: the memory of keys and values."""
_FIRST_TOKEN, _DRAWS = 0, 1

Int64s = NDArray[np.int64]
T = TypeVar("T")


def build_own_text(config: Config, base: nn.Module, weights: BaseWeights, peers: Ranks) -> Path:
    """Return the folder of the shards that are replayed; those that are held out lie in FOLDER_probe. What is not there
    is written first, by all ranks together, and is the same for any number of them.

    Args:
        config: the run's config.
        base: in eval mode, nothing attached to it.
        weights: of the base.
        peers: the other ranks.

    Raises:
        ConfigError: on every rank: what kept rank 0 from writing the shards, or a shard that is there has another size.
    """
    tokenizer, _ = read_tokenizer(config.base.model, config.base.revision)
    info = tokenizer_info(tokenizer)
    folder = _folder(config, weights, info)
    parts = [
        _Part("train", folder, config.replay.own_blocks),
        _Part("probe", folder.with_name(f"{folder.name}_probe"), max(16, config.replay.own_blocks // 8)),
    ]
    missing = [part for part in parts if part.split in _of_rank0(peers, partial(_missing, parts))]
    if not missing:
        return folder
    first, done, total = peers.rank == 0, 0, sum(part.blocks for part in missing)
    if first:
        say(f"the base writes {total:,} blocks of text of its own into {folder}, on first use")
    writer = _Writer(base, tokenizer, info, config.base.block_size)
    with doing("the base writes its own text", say, first) as far:
        for part in missing:
            mine = {}
            for rows in _batches(part.blocks, config.base.block_size)[peers.rank :: peers.world]:
                before, together = done + int(rows[0]), min(len(rows) * peers.world, part.blocks - int(rows[0]))
                mine[int(rows[0])] = writer.write(part, rows, partial(_note, far, before, together, total))
            written = {start: blocks for share in peers.gather(mine) for start, blocks in share.items()}
            blocks = np.concatenate([written[start] for start in sorted(written)])
            _of_rank0(peers, partial(_install, part, blocks, info, writer.last_id, config.base.model))
            done += part.blocks
    return folder


@dataclass(frozen=True)
class _Part:
    """What is replayed ("train"), or held out ("probe")."""

    split: str
    folder: Path
    blocks: int


class _Writer:
    """Draws blocks from the base's own distribution."""

    def __init__(self, base: nn.Module, tokenizer: Any, info: TokenizerInfo, block_size: int) -> None:
        self.base, self.block_size = base, block_size
        self.device = next(base.parameters()).device
        embeddings = int(base.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        self.last_id = min(embeddings, info.vocab_size) - 1
        backend = tokenizer.backend_tokenizer
        known = np.array(sorted(tokenizer.get_vocab().values()))
        ordinary = set(backend.get_vocab(with_added_tokens=False).values()) - set(backend.get_added_tokens_decoder())
        self.ordinary = np.array(sorted(id_ for id_ in ordinary if id_ <= self.last_id))
        """Ids of the tokens that are part of a text, and nothing else."""
        self.unknown = torch.ones(embeddings, dtype=torch.bool, device=self.device)
        """Embeddings without a token: room that a base was given to have a round number of them."""
        self.unknown[torch.from_numpy(known[known <= self.last_id]).to(self.device)] = False
        self.before = info.bos_token_ids
        self.at_start = info.bos_token_ids or (info.eos_token_id,)

    @torch.no_grad()
    def write(self, part: _Part, rows: Int64s, note: Callable[[float], None]) -> Int64s:
        """Return the blocks of these numbers, (rows,) to (rows, block_size) int64; `note` is told the share that is
        done."""
        begin = torch.from_numpy(self._beginnings(part, rows)).to(self.device)
        generator = torch.Generator(self.device)
        generator.manual_seed(int(hash64(RECIPE_VERSION, _DRAWS, _seed(part), int(rows[0])) >> np.uint64(1)))
        written = torch.empty(len(rows), self.block_size, dtype=torch.int64, device=self.device)
        written[:, 0] = begin[:, 0]
        past: Any = None
        for place in range(1, self.block_size):
            out = self.base(input_ids=written[:, place - 1, None], past_key_values=past, use_cache=True)
            past = out.past_key_values
            drawn = self._draw(out.logits[:, -1], generator)
            given = begin[:, place] if place < begin.shape[1] else None
            written[:, place] = drawn if given is None else torch.where(given >= 0, given, drawn)
            note(place / self.block_size)
        return written.cpu().numpy()

    def _beginnings(self, part: _Part, rows: Int64s) -> Int64s:
        """Return what the blocks begin with, (rows, n); -1 is a token that is drawn from the base."""
        picked = hash64(RECIPE_VERSION, _FIRST_TOKEN, _seed(part), rows) % np.uint64(len(self.ordinary))
        begin = np.full((len(rows), max(len(self.at_start), len(self.before) + 1)), -1, dtype=np.int64)
        begin[:, : len(self.at_start)] = self.at_start
        odd = rows % 2 == 1
        begin[odd, : len(self.before)] = self.before
        begin[odd, len(self.before)] = self.ordinary[picked[odd].astype(np.int64)]
        return begin[:, : self.block_size]

    def _draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Return a token for each row of logits, (rows, V) to (rows,) int64, without the host waiting for the
        device."""
        # In float64: a sum of 10⁵ small probabilities in float32 would lose the last ones.
        sums = logits.double().masked_fill_(self.unknown, -torch.inf).softmax(-1).cumsum(-1)
        spot = torch.rand(len(sums), 1, dtype=sums.dtype, device=self.device, generator=generator) * sums[:, -1:]
        return torch.searchsorted(sums, spot, right=True).squeeze(1)


def _folder(config: Config, weights: BaseWeights, info: TokenizerInfo) -> Path:
    decides = [RECIPE_VERSION, weights.rounded, info.fingerprint, info.eos_token_id, info.bos_token_ids]
    decides += [config.base.block_size, config.replay.own_blocks]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    name = config.base.model.rstrip("/").rpartition("/")[2]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "base"
    return Path(config.build.folder).absolute() / f"own-{slug}-{digest[:12]}"


def _seed(part: _Part) -> int:
    return int(part.split == "probe")


def _batches(blocks: int, block_size: int) -> list[Int64s]:
    """Return the numbers of the blocks that are written at once; not a matter of ranks, as they share a generator."""
    size = max(1, min(BATCH_BLOCKS, BATCH_TOKENS // block_size))
    return [np.arange(start, min(start + size, blocks)) for start in range(0, blocks, size)]


def _note(far: Far, before: int, together: int, total: int, share: float) -> None:
    """Return how far all ranks are, by what this one has done of its batch."""
    far(before + int(share * together), total, "blocks")


def _missing(parts: list[_Part]) -> list[str]:
    missing = []
    for part in parts:
        refuse_foreign(part.folder)
        if not (part.folder / MANIFEST_NAME).is_file():
            missing.append(part.split)
            continue
        try:
            ShardSet(part.folder).check_sizes()
        except ValueError as error:
            raise ValueError(f"{error}; or delete {part.folder}, and the base writes it again") from error
    return missing


def _install(part: _Part, blocks: Int64s, info: TokenizerInfo, last_id: int, model: str) -> None:
    """Writes shards, which get their name when all of them are there."""
    dtype = "uint16" if info.vocab_size <= 2**16 else "uint32"
    temporary = temporary_folder(part.folder)
    block_bytes = blocks.shape[1] * np.dtype(dtype).itemsize
    writer = ShardWriter(temporary, dtype, blocks_in(DEFAULT_SHARD_BYTES, block_bytes))
    try:
        writer.write(blocks)
        manifest = Manifest(
            version=MANIFEST_VERSION,
            split=part.split,
            block_size=blocks.shape[1],
            dtype=dtype,
            documents=0,  # blocks were drawn, not documents
            empty_documents=0,
            tokens=blocks.size,
            dropped_tokens=0,
            blocks=len(blocks),
            shards=writer.close(),
            tokenizer=info,
            sources=(f"text that {Path(model).name} writes by itself",),
            text_column=None,
            holdout=0.0,
            max_tokens=None,
            licence=None,
            highest_id=last_id if last_id + 1 < info.vocab_size else None,
            note=f"drawn from the base at temperature 1, recipe {RECIPE_VERSION}: no text that anybody has written",
        )
        manifest.write(temporary)
        try:
            install_folder(temporary, part.folder, manifest)
        except FileExistsError:
            # Another run was faster, on a device that rounds otherwise: its text is the base's own as well.
            if not (part.folder / MANIFEST_NAME).is_file():
                raise
    finally:
        writer.abandon()
        shutil.rmtree(temporary, ignore_errors=True)


def _of_rank0(peers: Ranks, do: Callable[[], T]) -> T:
    """Return what rank 0 gets of it, on every rank, or its refusal."""
    found: T | None = None
    refusal: ConfigError | None = None
    if peers.rank == 0:
        try:
            found = do()
        except (OSError, ValueError) as error:
            refusal = ConfigError(f"replay.base = {SELF}: {error}")
    found, refusal = peers.from_rank0((found, refusal))
    if refusal is not None:
        raise refusal
    return cast(T, found)
