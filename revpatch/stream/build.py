"""Documents → token shards.

    documents -> (holdout: train or probe, by a hash of the text) -> token ids, each document ended by EOS
              -> one long row of tokens -> blocks of block_size -> tars -> manifest, last

All is written into a temporary folder beside `out` and renamed when whole, so a folder that has the name of a set
is that set. The same sources give the same bytes, whenever and wherever they are built.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from revpatch.stream.manifest import MANIFEST_VERSION, Manifest, TokenizerInfo
from revpatch.stream.sources import Document, read_documents
from revpatch.stream.tars import (
    DEFAULT_SHARD_BYTES,
    ShardWriter,
    blocks_in,
    check_installable,
    install_folder,
    refuse_foreign,
    temporary_folder,
)

_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 2**20


@dataclass(frozen=True)
class Progress:
    """How far a build is: documents read, tokens and blocks written, on both sides of the holdout."""

    documents: int
    tokens: int
    blocks: int


def build_shards(
    sources: Iterable[str | Path],
    tokenizer: Any,
    block_size: int,
    out: str | Path,
    *,
    text_column: str = "text",
    licence: str | None = None,
    note: str | None = None,
    holdout: float = 0.0,
    max_tokens: int | None = None,
    blocks_per_shard: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Tokenise `sources` into the folder `out` and return its manifest.

    With `holdout` > 0 about that fraction of the documents, chosen by a hash of their text, goes into the folder
    `<out>_probe` instead: the same text is always on the same side, whatever else is in the corpus.
    `max_tokens` ends the training side after so many tokens, in the middle of a document if need be.
    Text that spells a special token becomes that token, as it does when the tokenizer is called.

    A folder that is there already is left alone if it is this very build and refused otherwise.
    Raises FileNotFoundError and ValueError for what sources.py refuses, ValueError for impossible numbers, too
    little text, or a tokenizer that is not fast or has no EOS, and FileExistsError for an `out` that holds
    something else.
    """
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}; a block needs at least 2 tokens to predict one from another")
    if not 0.0 <= holdout < 1.0:
        raise ValueError(f"holdout is {holdout}; it is a fraction of the documents, at least 0 and less than 1")
    if max_tokens is not None and max_tokens < block_size:
        raise ValueError(f"max_tokens is {max_tokens}, less than one block of {block_size}; raise it, or leave it out")
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    documents = read_documents(sources, text_column)
    info = TokenizerInfo.of(tokenizer)
    dtype = "uint16" if info.vocab_size <= 2**16 else "uint32"
    if blocks_per_shard is None:
        blocks_per_shard = blocks_in(DEFAULT_SHARD_BYTES, block_size * np.dtype(dtype).itemsize)

    out = Path(out).resolve()
    folders = {"train" if holdout else "all": out} | ({"probe": out.with_name(f"{out.name}_probe")} if holdout else {})
    for folder in folders.values():
        refuse_foreign(folder)

    sides: dict[str, _Side] = {}
    try:
        for split, folder in folders.items():
            limit = None if split == "probe" else max_tokens
            sides[split] = _Side(folder, dtype, block_size, info.eos_token_id, blocks_per_shard, limit)
        _fill(sides, documents, tokenizer, holdout, progress)
        manifests = {}
        for split, side in sides.items():
            manifests[split] = Manifest(
                version=MANIFEST_VERSION,
                split=split,
                block_size=block_size,
                dtype=dtype,
                documents=side.documents,
                empty_documents=side.empty_documents,
                tokens=side.tokens,
                dropped_tokens=len(side.rest),
                blocks=side.writer.blocks,
                shards=side.writer.close(),
                tokenizer=info,
                sources=tuple(Path(source).name for source in sources),
                text_column=text_column,
                holdout=float(holdout),
                max_tokens=max_tokens,
                licence=licence,
                note=note,
            )
            _check_enough(manifests[split], holdout)
            manifests[split].write(side.temporary)
        for split, folder in folders.items():
            check_installable(folder, manifests[split])
        for split in reversed(folders):  # the probe first: a set without its probe would look whole
            install_folder(sides[split].temporary, folders[split], manifests[split])
        return manifests["train" if holdout else "all"]
    finally:
        for side in sides.values():
            side.writer.abandon()
            shutil.rmtree(side.temporary, ignore_errors=True)


def is_held_out(text: str, holdout: float) -> bool:
    """Whether a document is on the probe's side: a function of its text alone, and of the fraction."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=b"holdout").digest()
    return int.from_bytes(digest, "big") < holdout * 2**64


class _Side:
    """One side of the holdout while it is written: a row of tokens, cut into blocks as it grows."""

    def __init__(
        self, folder: Path, dtype: str, block_size: int, eos: int, blocks_per_shard: int, limit: int | None
    ) -> None:
        self.temporary = temporary_folder(folder)
        self.writer = ShardWriter(self.temporary, dtype, blocks_per_shard)
        self.block_size = block_size
        self.eos = eos
        self.limit = limit
        self.documents = 0
        self.empty_documents = 0
        self.tokens = 0
        self.pending: list[np.ndarray[Any, Any]] = []
        self.rest = np.empty(0, dtype=np.int64)

    @property
    def full(self) -> bool:
        return self.limit is not None and self.tokens >= self.limit

    def add(self, ids: list[int]) -> None:
        """Take one document's ids. They are written at the next `cut`."""
        if not ids:
            self.empty_documents += 1
            return
        ended = np.array([*ids, self.eos], dtype=np.int64)
        if self.limit is not None:
            ended = ended[: self.limit - self.tokens]
        self.documents += 1
        self.tokens += len(ended)
        self.pending.append(ended)

    def cut(self) -> None:
        """Write the whole blocks of what was added, and keep the rest."""
        row = np.concatenate([self.rest, *self.pending])
        self.pending.clear()
        whole = len(row) // self.block_size * self.block_size
        self.writer.write(row[:whole].reshape(-1, self.block_size))
        self.rest = row[whole:]


def _fill(
    sides: dict[str, _Side],
    documents: Iterator[Document],
    tokenizer: Any,
    holdout: float,
    progress: Callable[[Progress], None] | None,
) -> None:
    # A copy of our own: truncation and padding may be on in the caller's, and are not ours to switch off there.
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
    train = next(iter(sides.values()))
    for batch in _batches(documents):
        encoded = encoder.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encoded, strict=True):
            if train.full:
                break
            side = sides["probe"] if holdout and is_held_out(document.text, holdout) else train
            side.add(encoding.ids)
        for side in sides.values():
            side.cut()
        if progress is not None:
            documents_done, tokens, blocks = (
                sum(counts)
                for counts in zip(*((s.documents, s.tokens, s.writer.blocks) for s in sides.values()), strict=True)
            )
            progress(Progress(documents_done, tokens, blocks))
        if train.full:
            return


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Batches that are large enough for the tokenizer's threads and small enough for the memory."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_enough(manifest: Manifest, holdout: float) -> None:
    if manifest.blocks:
        return
    found = (
        f"{manifest.documents} documents ({manifest.empty_documents} more were empty) of {manifest.tokens} tokens "
        f"in {', '.join(manifest.sources) or 'no source at all'}"
    )
    if manifest.split == "all":
        raise ValueError(f"not one block of {manifest.block_size} tokens: {found}; add text, or lower block_size")
    raise ValueError(
        f"not one block of {manifest.block_size} tokens on the {manifest.split} side of holdout {holdout}: {found}; "
        "add text, change holdout, or lower block_size"
    )
