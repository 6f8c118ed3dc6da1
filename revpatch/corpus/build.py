"""Documents → token shards.

    documents -> (holdout: train or probe, by a hash of the text) -> token ids, each document framed (tokenizer.py)
              -> one long row of tokens -> blocks of block_size -> tars -> manifest, last

This process reads and writes, in order; worker processes tokenise. All is written into a folder beside `out` and
renamed when whole, so a folder that has the name of a set is that set. The same call resumes a build that was killed.
The same sources give the same bytes, whenever and wherever they are built, by however many workers,
and however often they were killed.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from revpatch.corpus.checkpoint import Split, Splits, UnfinishedBuild
from revpatch.corpus.chunks import (
    CONTEXT_CHARACTERS,
    LONG_CHARACTERS,
    PIECE_CHARACTERS,
    BadDocumentError,
    ChunkReading,
    CorpusError,
    Position,
    ReadBeforeError,
    TextChunk,
    is_blank,
    read_chunks,
)
from revpatch.corpus.documents import Document, Input, Reading
from revpatch.corpus.encode import COUNTED, Encoder, EncoderRecipe, Work, encode_in_order, share_of
from revpatch.corpus.progress import BuildProgress
from revpatch.corpus.sources import find_inputs, name_of_source
from revpatch.corpus.tokenizer import tokenizer_info
from revpatch.shards.format import (
    DEFAULT_SHARD_BYTES,
    MANIFEST_NAME,
    MANIFEST_VERSION,
    Manifest,
    blocks_in,
    check_installable,
    install_folder,
    plain,
    refuse_foreign,
)

CHECKPOINT_SECONDS = 5.0
MAX_LOST = 0.01
"""Of the characters, where the tokenizer can't spell them all."""
_MANY_LOST, _ENOUGH_CHARACTERS = 0.001, 2**24
_log = logging.getLogger(__name__)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SEPARATOR = "<|endoftext|>"
_FEW_DOCUMENTS = 100
OnBad = Literal["stop", "skip"]


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
    on_bad: OnBad = "stop",
    max_lost: float = MAX_LOST,
    progress: Callable[[BuildProgress], None] | None = None,
) -> Manifest:
    """Tokenise `sources` (sources.py says what they may be) into the folder `out` and return its manifest.

    With `holdout` > 0 about that fraction of the documents, chosen by a hash of their text, goes into the folder
    `<out>_probe` instead: the same text is always on the same side, whatever else is in the corpus. Of a corpus of one
    document the end is held out: about that fraction of its characters.
    In plain text, `<|endoftext|>` and the tokenizer's EOS stand between documents. One of white space alone is empty.
    `max_tokens` ends the training side after so many tokens, in the middle of a document if need be.
    A shard holds `blocks_per_shard` blocks, or as many as fit `shard_bytes`.
    One worker is this process. More of them are processes of their own; a script that asks for them must do so under
    `if __name__ == "__main__":`, as they import it.
    Text that spells a special token becomes that token, as it does when the tokenizer is called; the manifest counts
    them. `max_lost` is the fraction of the characters that may vanish or become the unknown token, where the tokenizer
    can't spell them; it is no part of what is built.
    With `on_bad` "skip", documents that can't be read are left out, and counted and listed in the manifest.

    A folder that is there already is left alone if it is this very build and refused otherwise.
    Raises what `find_inputs` and the readers do; BadDocumentError for a document that can't be read;
    ValueError for impossible numbers, too little text, too many lost characters, a file that is written to meanwhile,
    an `out` within a source, or a tokenizer that is not fast or has no EOS; FileExistsError for an `out` that holds
    something else (what was built by then is kept) or an unfinished build of another recipe; BlockingIOError when
    another build into `out` is at work; FileNotFoundError when a side that was installed before a kill is gone; OSError
    when the disk is full or a worker dies. The same call resumes a build that ended so, or was killed, once the cause
    is gone: what a source holds behind what was read of it may be another then.
    """
    _check_numbers(block_size, holdout, max_tokens, workers, max_lost)
    if on_bad not in ("stop", "skip"):
        raise ValueError(f"on_bad is {on_bad!r}; it must be 'stop' or 'skip'")
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    inputs = find_inputs(sources)
    info = tokenizer_info(tokenizer)
    dtype = "uint16" if info.vocab_size <= 2**16 else "uint32"
    if blocks_per_shard is None:
        blocks_per_shard = blocks_in(shard_bytes, block_size * np.dtype(dtype).itemsize)
    out = Path(out).resolve()
    folders = {"train" if holdout else "all": out} | ({"probe": out.with_name(f"{out.name}_probe")} if holdout else {})
    for folder in folders.values():
        refuse_foreign(folder)
        _refuse_within_source(folder, sources)
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
    encoder = EncoderRecipe.of(tokenizer, info, dtype, holdout)
    eos = tokenizer.backend_tokenizer.id_to_token(info.eos_token_id) or ""
    separators = tuple(dict.fromkeys([_SEPARATOR, *([eos] if eos.strip() else [])]))
    with _opened(out, recipe, blocks_per_shard, inputs, separators) as unfinished:
        splits = [Split(unfinished.folder / split, dtype, block_size, blocks_per_shard) for split in folders]
        sides = Splits(splits[0], splits[1] if holdout else None, max_tokens, info.eos_token_id, info.bos_token_ids)
        lost = LostText(out, info.name, max_lost, unfinished.folder)
        try:
            reading = ChunkReading(
                text_column,
                separators,
                float(holdout),
                skip_bad=on_bad == "skip",
                verify=unfinished.changed,
                encode=_lazily(encoder),
            )
            end = _fill(sides, inputs, reading, encoder, workers, unfinished, lost, progress)
        finally:
            for row in splits:
                row.writer.abandon()
        lost.check(sides)
        last_added = max(tokenizer.backend_tokenizer.get_added_tokens_decoder(), default=-1)
        found = {
            "holdout_rule": "tail" if end.lone else "hash",
            "bad_documents": sides.bad_documents,
            "bad": tuple(sides.bad),
        }
        manifests = {
            split: _manifest(split, row, recipe | found, last_added) for split, row in zip(folders, splits, strict=True)
        }
        for manifest in manifests.values():
            if not manifest.blocks:
                raise CorpusError(_nothing_built(manifest, sides, inputs, reading))
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


def _refuse_within_source(folder: Path, sources: Sequence[str | Path]) -> None:
    for source in sources:
        if Path(source).is_dir() and folder.is_relative_to(Path(source).resolve()):
            raise ValueError(
                f"{folder}: lies in {source}, which is read as a source; choose a folder outside of it, or name the "
                "files in it as sources"
            )


def _lazily(recipe: EncoderRecipe) -> Callable[[str], list[int]]:
    """Return what encodes a text in this process; the tokenizer is loaded when it is first called."""
    encoder = cache(partial(Encoder, recipe))
    return lambda text: encoder().ids(text)


def _check_numbers(block_size: int, holdout: float, max_tokens: int | None, workers: int, max_lost: float) -> None:
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}; a block needs at least 2 tokens to predict one from another")
    if not 0.0 <= holdout < 1.0:
        raise ValueError(f"holdout is {holdout}; it is a fraction of the documents, at least 0 and less than 1")
    if max_tokens is not None and max_tokens < block_size:
        raise ValueError(f"max_tokens is {max_tokens}, less than one block of {block_size}; raise it, or leave it out")
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1, which is this process alone")
    if not 0.0 <= max_lost <= 1.0:
        raise ValueError(f"max_lost is {max_lost}; it is a fraction of the characters, 0 to 1")


@contextmanager
def _opened(
    out: Path, recipe: dict[str, Any], blocks_per_shard: int, inputs: Sequence[Input], separators: Sequence[str]
) -> Iterator[UnfinishedBuild]:
    """The unfinished build's folder. It is kept for a later call when this one fails after a checkpoint."""
    recorded = {
        **recipe,
        "tokenizer": plain(recipe["tokenizer"]),
        "sources": list(recipe["sources"]),
        "blocks_per_shard": blocks_per_shard,
        "separators": list(separators),
        "long_documents": [LONG_CHARACTERS, PIECE_CHARACTERS, CONTEXT_CHARACTERS],
    }
    unfinished = UnfinishedBuild(out, recorded, [{"name": found.name, **found.identity} for found in inputs])
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
            goes_on = "resume" if keep else "build it"
            raise OSError(
                error.errno,
                f"{out}: the disk that it is written to is full ({error.strerror}); make room and run the same "
                f"command again to {goes_on}",
            ) from error
        raise
    finally:
        unfinished.close(keep=keep)


def _fill(
    splits: Splits,
    inputs: Sequence[Input],
    reading: ChunkReading,
    encoder: EncoderRecipe,
    workers: int,
    unfinished: UnfinishedBuild,
    lost: LostText,
    progress: Callable[[BuildProgress], None] | None,
) -> Position:
    """Write all shards, from the last checkpoint on. Return where it ended."""
    position = Position()
    if unfinished.checkpoint is not None:
        position = Position(**unfinished.checkpoint["position"])
        splits.restore(unfinished.checkpoint["rows"], is_whole=unfinished.checkpoint["is_whole"])
        if splits.bad_documents and not reading.skip_bad:
            raise ValueError(
                f"{unfinished.folder}: holds an unfinished build that has left out {splits.bad_documents} documents, "
                f"the first being {splits.bad[0]}; resume it with --on-bad skip, or delete that folder to build anew"
            )
        if unfinished.checkpoint["is_whole"]:
            return position
    else:
        splits.start()
    end, saved = position, time.monotonic()
    waiting: deque[TextChunk] = deque()
    sizes = [found.bytes for found in inputs if found.bytes is not None]
    in_all = sum(sizes) if sizes else None
    tokens_in_all = None if splits.limit is None else int(splits.limit / (1 - encoder.holdout))

    def works() -> Iterator[Work]:
        try:
            for chunk in read_chunks(inputs, reading, position):
                waiting.append(chunk)
                yield chunk.work
        except CorpusError:
            raise
        except ValueError as error:
            kind = BadDocumentError if isinstance(error, BadDocumentError) else ValueError
            raise kind(_with_remedy(error, unfinished)) from error

    for encoded in encode_in_order(works(), encoder, workers):
        chunk = waiting.popleft()
        end = chunk.end
        if chunk.work.is_piece:
            splits.add_piece(encoded, chunk.held_out, chunk.is_last_piece)
        else:
            splits.add_documents(encoded, chunk.bad)
        if splits.text_counts()[0] >= _ENOUGH_CHARACTERS:
            lost.refuse(splits)
        if progress is not None:
            progress(BuildProgress(*splits.counts(), chunk.bytes_read, in_all, tokens_in_all))
        if splits.full:
            break
        if time.monotonic() - saved >= CHECKPOINT_SECONDS:
            unfinished.save({"position": asdict(end), "rows": splits.state(), "is_whole": False})
            saved = time.monotonic()
    splits.close()
    end = Position(len(inputs), lone=end.lone)
    if all(row.writer.blocks for row in splits.sides):
        unfinished.save({"position": asdict(end), "rows": splits.state(), "is_whole": True})
    return end


def _with_remedy(error: ValueError, unfinished: UnfinishedBuild) -> str:
    """Return what went wrong with a source, and what becomes of what was built before."""
    text, kept = str(error), unfinished.checkpoint is not None
    if isinstance(error, BadDocumentError) and "--on-bad skip" not in text:
        text += (
            ". Or leave such documents out with --on-bad skip, which counts them and lists the first in the manifest"
        )
    if isinstance(error, ReadBeforeError):
        return f"{text}; put back what was there to resume it, or delete {unfinished.folder} to build anew"
    if kept:
        text += (
            f". What was built by then is kept in {unfinished.folder}: mend what is wrong, leave what was read before "
            "as it is, and the same command resumes from there"
        )
    return text


@dataclass(frozen=True)
class LostText:
    """How much of the text a build may lose, because its tokenizer can't spell it; `kept` is the unfinished folder."""

    out: Path
    tokenizer: str
    max_lost: float
    kept: Path

    def refuse(self, splits: Splits) -> None:
        """Raise ValueError where it is more."""
        characters, lost, _, _ = splits.text_counts()
        if lost <= self.max_lost * characters:
            return
        refusal = (
            f"{self._words(characters, lost)}, and at most {self.max_lost:.2%} may be lost: choose a tokenizer that "
            "knows these characters, or accept it by `revpatch shards build ... --max-lost "
            f"{min(1.0, 1.1 * lost / characters):.2g}`"
        )
        if characters < _ENOUGH_CHARACTERS:
            raise CorpusError(refusal)
        raise ValueError(
            f"{refusal}. What was built by now is kept in {self.kept}, and the same build with a higher bound resumes "
            "it; delete it to build otherwise"
        )

    def check(self, splits: Splits) -> None:
        """Refuse a whole build that lost too much, and log what is worth knowing of its text."""
        self.refuse(splits)
        characters, lost, special, pages = splits.text_counts()
        if lost > _MANY_LOST * characters:
            _log.warning("%s", self._words(characters, lost))
        if special:
            _log.warning("%s: the text spells special tokens %d times, and they became these tokens", self.out, special)
        if pages:
            _log.warning(
                "%s: %d documents are pages of HTML, and their tags are learned as text: unless that is meant, strip "
                "the tags (pandoc -f html -t plain FILE -o NEW.txt) and build anew",
                self.out,
                pages,
            )

    def _words(self, characters: int, lost: int) -> str:
        return (
            f"{self.out}: tokenizer {self.tokenizer!r} can't spell {lost:,} of {characters:,} characters "
            f"({lost / characters:.2%}): they vanish or become its unknown token"
        )


def _manifest(split: str, row: Split, recipe: dict[str, Any], last_added: int) -> Manifest:
    is_last_held = row.highest_id + 1 >= recipe["tokenizer"].vocab_size
    counted: dict[str, Any] = dict(zip(COUNTED, row.counts.tolist(), strict=True))
    del counted["pages"]  # told once, when they are built
    return Manifest(
        version=MANIFEST_VERSION,
        split=split,
        documents=row.documents,
        empty_documents=row.empty_documents,
        tokens=row.tokens,
        dropped_tokens=len(row.rest),
        blocks=row.writer.blocks,
        shards=tuple(row.writer.shards),
        # Of use where a base has fewer embeddings than its tokenizer ids; else the vocabulary's size says it.
        highest_id=None if is_last_held or last_added + 1 < recipe["tokenizer"].vocab_size else row.highest_id,
        **counted,
        **recipe,
    )


def _nothing_built(manifest: Manifest, sides: Splits, inputs: Sequence[Input], reading: ChunkReading) -> str:
    """Return why a side has no block, and what to do."""
    documents = sides.counts()[0]
    bad = f", {manifest.bad_documents} could not be read: {manifest.bad[0]}" if manifest.bad_documents else ""
    found = (
        f"{manifest.documents} documents ({manifest.empty_documents} more were empty{bad}) of {manifest.tokens} tokens "
        f"in {', '.join(manifest.sources) or 'no source at all'}"
    )
    if manifest.split == "all" or not documents:
        return f"not one block of {manifest.block_size} tokens: {found}; add text, or lower block_size"
    text = (
        f"not one block of {manifest.block_size} tokens on the {manifest.split} side of holdout {manifest.holdout}: "
        f"{found}; "
    )
    if manifest.holdout_rule == "tail":
        return text + (
            f"the corpus is one document, so the last {manifest.holdout} of it was held out: "
            f"{'raise' if manifest.split == 'probe' else 'lower'} holdout, lower block_size, or divide the text into "
            f"documents (in plain text, by lines of {_SEPARATOR})"
        )
    if sides.full and manifest.split == "probe":
        return text + (
            f"the training side was full with max_tokens {manifest.max_tokens} after {documents} documents of both "
            "sides: raise max_tokens or holdout, or divide the text into shorter documents"
        )
    if documents > _FEW_DOCUMENTS:
        return text + "add text, change holdout, or lower block_size"
    return text + (
        f"the sides are chosen by a hash of each text, and of {documents} documents {manifest.documents} fell on this "
        f"one: {_better_holdout(manifest, inputs, reading)}divide the text into more documents (in plain text, by "
        f"lines of {_SEPARATOR}), lower block_size, or build other text as the probe"
    )


def _better_holdout(manifest: Manifest, inputs: Sequence[Input], reading: ChunkReading) -> str:
    """Return the advice to take a holdout that puts one document more on a side, if there is one for both sides."""
    told = Reading(reading.text_column, separators=reading.separators)
    read = (document for found in inputs for document in found.read(told))
    shares = sorted(share_of(each.text) for each in read if isinstance(each, Document) and not is_blank(each.text))
    wanted = manifest.documents + 1
    if wanted >= len(shares):
        return ""
    share = shares[wanted - 1 if manifest.split == "probe" else -wanted]
    holdout = (math.floor(share * 1000) + (manifest.split == "probe")) / 1000
    held_out = sum(share < holdout for share in shares)
    there = held_out if manifest.split == "probe" else len(shares) - held_out
    if not 0 < held_out < len(shares) or there < wanted:
        return ""
    return f"set holdout to {holdout:g}, which puts {there} of them there, "


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
