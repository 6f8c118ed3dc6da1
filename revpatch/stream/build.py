"""Documents → token shards.

    documents -> (holdout: train or probe, by a hash of the text) -> token ids, each document ended by EOS
              -> one long row of tokens -> blocks of block_size -> tars -> manifest, last

This process reads and writes, in order; worker processes tokenise. All is written into a folder beside `out` and
renamed when whole, so a folder that has the name of a set is that set. A build that was killed is gone on with by
the same call. The same sources give the same bytes, whenever and wherever they are built, by however many workers,
and however often they were killed.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from revpatch.stream.chunks import LONG_CHARACTERS, PIECE_CHARACTERS, Chunk, Position, read_chunks
from revpatch.stream.documents import Input
from revpatch.stream.encode import EncoderRecipe, Work, encode_in_order
from revpatch.stream.manifest import MANIFEST_NAME, MANIFEST_VERSION, Manifest, TokenizerInfo
from revpatch.stream.rows import Row, Rows
from revpatch.stream.sources import find_inputs, name_of_source
from revpatch.stream.tars import DEFAULT_SHARD_BYTES, blocks_in, check_installable, install_folder, refuse_foreign
from revpatch.stream.unfinished import UnfinishedBuild

CHECKPOINT_SECONDS = 5.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CorpusError(ValueError):
    """What is wrong is the corpus as a whole, so nothing of the build is worth keeping."""


@dataclass(frozen=True)
class Progress:
    """How far a build is: documents read, tokens and blocks written, on both sides of the holdout.

    `bytes_read` counts what was taken of those inputs whose size is known; these have `bytes_in_all`, None for none.
    `tokens_in_all` is about where `max_tokens` ends it, if it does.
    """

    documents: int
    tokens: int
    blocks: int
    bytes_read: int
    bytes_in_all: int | None
    tokens_in_all: int | None = None


def build_shards(
    sources: str | Path | Iterable[str | Path],
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
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    workers: int = 1,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Tokenise `sources` (sources.py says what they may be) into the folder `out` and return its manifest.

    With `holdout` > 0 about that fraction of the documents, chosen by a hash of their text, goes into the folder
    `<out>_probe` instead: the same text is always on the same side, whatever else is in the corpus.
    `max_tokens` ends the training side after so many tokens, in the middle of a document if need be.
    A shard holds `blocks_per_shard` blocks, or as many as fit `shard_bytes`.
    One worker is this process. More of them are processes of their own; a script that asks for them must do so under
    `if __name__ == "__main__":`, as they import it.
    Text that spells a special token becomes that token, as it does when the tokenizer is called.

    A folder that is there already is left alone if it is this very build and refused otherwise.
    Raises what `find_inputs` and the readers do; ValueError for impossible numbers, too little text, or a tokenizer
    that is not fast or has no EOS; FileExistsError for an `out` that holds something else
    (what was built by then is kept) or an unfinished build of another recipe; BlockingIOError when another build into
    `out` is at work; FileNotFoundError when a side that was installed before a kill is gone; OSError when the disk is
    full or a worker dies. After the last of these, or after being killed, the same call goes on.
    """
    _check_numbers(block_size, holdout, max_tokens, workers)
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    inputs = find_inputs(sources)
    info = TokenizerInfo.of(tokenizer)
    dtype = "uint16" if info.vocab_size <= 2**16 else "uint32"
    if blocks_per_shard is None:
        blocks_per_shard = blocks_in(shard_bytes, block_size * np.dtype(dtype).itemsize)
    out = Path(out).resolve()
    folders = {"train" if holdout else "all": out} | ({"probe": out.with_name(f"{out.name}_probe")} if holdout else {})
    for folder in folders.values():
        refuse_foreign(folder)
    recipe = {
        "block_size": block_size,
        "dtype": dtype,
        "tokenizer": info,
        "sources": tuple(name_of_source(source) for source in sources),
        "text_column": text_column,
        "holdout": float(holdout),
        "max_tokens": max_tokens,
        "licence": licence,
        "note": note,
    }
    for folder in folders.values():
        _refuse_other_recipe(folder, recipe)
    encoder = EncoderRecipe.of(tokenizer, info.eos_token_id, dtype, holdout)
    with _opened(out, recipe, blocks_per_shard, inputs) as unfinished:
        rows = [Row(unfinished.folder / split, dtype, block_size, blocks_per_shard) for split in folders]
        sides = Rows(rows[0], rows[1] if holdout else None, max_tokens, info.eos_token_id)
        try:
            _fill(sides, inputs, text_column, encoder, workers, unfinished, progress)
        finally:
            for row in rows:
                row.writer.abandon()
        manifests = {split: _manifest(split, row, recipe) for split, row in zip(folders, rows, strict=True)}
        _install(manifests, folders, unfinished)
    return next(iter(manifests.values()))


def _refuse_other_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Before any work is done: what was built otherwise can't become this build."""
    if not (folder / MANIFEST_NAME).is_file():
        return
    there = Manifest.read(folder)
    differing = [f"{key} ({getattr(there, key)!r} there)" for key in recipe if getattr(there, key) != recipe[key]]
    if differing:
        raise FileExistsError(
            f"{folder}: holds another set of shards (it differs in {', '.join(differing)}); choose another folder, or "
            "remove this one first"
        )


def _check_numbers(block_size: int, holdout: float, max_tokens: int | None, workers: int) -> None:
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}; a block needs at least 2 tokens to predict one from another")
    if not 0.0 <= holdout < 1.0:
        raise ValueError(f"holdout is {holdout}; it is a fraction of the documents, at least 0 and less than 1")
    if max_tokens is not None and max_tokens < block_size:
        raise ValueError(f"max_tokens is {max_tokens}, less than one block of {block_size}; raise it, or leave it out")
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1, which is this process alone")


@contextmanager
def _opened(
    out: Path, recipe: dict[str, Any], blocks_per_shard: int, inputs: Sequence[Input]
) -> Iterator[UnfinishedBuild]:
    """The unfinished build's folder. It is kept for a later call when this one fails after a checkpoint."""
    plain = {
        **recipe,
        "tokenizer": asdict(recipe["tokenizer"]),
        "sources": list(recipe["sources"]),
        "blocks_per_shard": blocks_per_shard,
        "long_documents": [LONG_CHARACTERS, PIECE_CHARACTERS],
    }
    unfinished = UnfinishedBuild(out, plain, [{"name": found.name, **found.identity} for found in inputs])
    keep = False
    try:
        yield unfinished
    except CorpusError:
        raise
    except FileExistsError as error:
        keep = True
        raise FileExistsError(
            f"{error}. What was built now is kept in {unfinished.folder}: once the other is out of the way, the same "
            "command puts it there"
        ) from error
    except BaseException as error:
        keep = unfinished.checkpoint is not None
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            goes_on = "go on" if keep else "build it"
            raise OSError(
                error.errno,
                f"{out}: the disk that it is written to is full ({error.strerror}); make room and run the same "
                f"command again to {goes_on}",
            ) from error
        raise
    finally:
        unfinished.close(keep=keep)


def _fill(
    rows: Rows,
    inputs: Sequence[Input],
    text_column: str,
    encoder: EncoderRecipe,
    workers: int,
    unfinished: UnfinishedBuild,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Write all shards, from the last checkpoint on."""
    position = Position()
    if unfinished.checkpoint is not None:
        position = Position(**unfinished.checkpoint["position"])
        rows.restore(unfinished.checkpoint["rows"], is_whole=unfinished.checkpoint["is_whole"])
        if unfinished.checkpoint["is_whole"]:
            return
    else:
        rows.start()
    saved = time.monotonic()
    waiting: deque[Chunk] = deque()
    sizes = [found.bytes for found in inputs if found.bytes is not None]
    in_all = sum(sizes) if sizes else None
    tokens_in_all = None if rows.limit is None else int(rows.limit / (1 - encoder.holdout))

    def works() -> Iterator[Work]:
        try:
            for chunk in read_chunks(inputs, text_column, encoder.holdout, position):
                waiting.append(chunk)
                yield chunk.work
        except ValueError as error:
            if unfinished.checkpoint is None:
                raise
            raise ValueError(
                f"{error}. What was built by then is kept in {unfinished.folder}, and is gone on with only if what it "
                "has read is unchanged: after mending a source that it had begun, delete that folder to build anew"
            ) from error

    for encoded in encode_in_order(works(), encoder, workers):
        chunk = waiting.popleft()
        if chunk.work.is_piece:
            rows.add_piece(encoded.ids, chunk.held_out, chunk.is_last_piece)
        else:
            rows.add_documents(encoded)
        if progress is not None:
            progress(Progress(*rows.counts(), chunk.bytes_read, in_all, tokens_in_all))
        if rows.full:
            break
        if time.monotonic() - saved >= CHECKPOINT_SECONDS:
            unfinished.save({"position": asdict(chunk.end), "rows": rows.state(), "is_whole": False})
            saved = time.monotonic()
    rows.close()
    end = {"position": asdict(Position(len(inputs))), "rows": rows.state(), "is_whole": True}
    if all(row.writer.blocks for row in rows.sides):
        unfinished.save(end)


def _manifest(split: str, row: Row, recipe: dict[str, Any]) -> Manifest:
    manifest = Manifest(
        version=MANIFEST_VERSION,
        split=split,
        documents=row.documents,
        empty_documents=row.empty_documents,
        tokens=row.tokens,
        dropped_tokens=len(row.rest),
        blocks=row.writer.blocks,
        shards=tuple(row.writer.shards),
        **recipe,
    )
    if manifest.blocks:
        return manifest
    found = (
        f"{manifest.documents} documents ({manifest.empty_documents} more were empty) of {manifest.tokens} tokens "
        f"in {', '.join(manifest.sources) or 'no source at all'}"
    )
    if manifest.split == "all":
        raise CorpusError(f"not one block of {manifest.block_size} tokens: {found}; add text, or lower block_size")
    raise CorpusError(
        f"not one block of {manifest.block_size} tokens on the {manifest.split} side of holdout {manifest.holdout}: "
        f"{found}; add text, change holdout, or lower block_size"
    )


def _install(manifests: dict[str, Manifest], folders: dict[str, Path], unfinished: UnfinishedBuild) -> None:
    for split, folder in folders.items():
        check_installable(folder, manifests[split])
        if not (unfinished.folder / split).is_dir() and not (folder / MANIFEST_NAME).is_file():
            raise FileNotFoundError(
                f"{folder}: a call of this build that was killed had put it there, and now it is gone: put it back, or "
                f"delete {unfinished.folder} to build anew"
            )
    for split in reversed(folders):  # the probe first: a set without its probe would look whole
        built = unfinished.folder / split
        if built.is_dir():  # not when an earlier call was killed after it had installed this one
            manifests[split].write(built)
            install_folder(built, folders[split], manifests[split])
