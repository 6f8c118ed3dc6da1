"""Texts to token ids, in this process or in several, in the same order; which side of the holdout a text is on.

Worker processes import this file, which therefore imports little: no torch, no transformers. The side of the holdout
is a function of the text alone, so the split neither leaks nor moves; of a single document the end is held out.
Characters that the tokenizer can't spell are counted, but for whitespace, which many tokenizers drop on purpose.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
import unicodedata
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from revpatch.shards.format import TokenizerInfo


def is_held_out(text: str, holdout: float) -> bool:
    """Return whether a document is on the probe's side when about the fraction `holdout` of all documents is."""
    return _rank_of(text) < holdout * 2**64


def share_of(text: str) -> float:
    """Return the least fraction, 0 to 1, from which on a document is held out, but for rounding."""
    return _rank_of(text) / 2**64


def place_of_tail(text: str, holdout: float) -> int:
    """Return where the last `holdout` of a text's characters begins: at a line's beginning or a space where one is
    near."""
    place = round(len(text) * (1 - holdout))
    near = place + (len(text) - place) // 2
    line = text.find("\n", place, near)
    if line >= 0:
        return line + 1
    space = text.find(" ", place, near)
    return space if space >= 0 else place


def _rank_of(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=b"holdout")
    return int.from_bytes(digest.digest(), "big")


_MARKS = "▁Ġ "
"""What normalizers and pre-tokenizers put before a word."""


class Spelling:
    """Counts what one tokenizer loses of a text.

    Args:
        backend: without truncation; its post-processor is not used.

    `can_lose` says whether there is anything to count at all.
    """

    def __init__(self, backend: Tokenizer) -> None:
        state = json.loads(backend.to_str())
        self._backend = backend
        self._model: dict[str, Any] = state["model"]
        self._vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=False)
        self.unknown = _unknown_of(self._model, self._vocabulary)
        """The id and the text of the unknown token, or None."""
        normalizers, pre_tokenizers = list(_parts(state["normalizer"])), list(_parts(state["pre_tokenizer"]))
        kinds = {part["type"] for part in (*normalizers, *pre_tokenizers)}
        in_bytes = "ByteLevel" in kinds and self._vocabulary.keys() >= set(ByteLevel.alphabet())
        self._falls_back = bool(self._model.get("byte_fallback"))
        complete = in_bytes or (self._falls_back and all(_byte(value) in self._vocabulary for value in range(256)))
        self._removes = any(map(_may_remove, (*normalizers, *pre_tokenizers)))
        self._vanishes = not complete and self._model["type"] == "BPE" and self.unknown is None
        self._has_unknown = not complete and self.unknown is not None
        self.can_lose = self._removes or self._vanishes or self._has_unknown
        self._lost: dict[str, bool] = {}

    def lost(self, text: str, ids: list[int]) -> int:
        """Return how many characters of `text` are in none of its `ids`, or in unknown ones."""
        count = 0
        if self._has_unknown and self.unknown is not None and self.unknown[0] in ids:
            count += self._in_unknown_tokens(text, *self.unknown)
        if self._removes or self._vanishes:
            count += sum(text.count(character) for character in set(text) if self._is_lost(character))
        return count

    def _in_unknown_tokens(self, text: str, unknown: int, spelled: str) -> int:
        encoding = self._backend.encode(text, add_special_tokens=False)
        spans = (
            text[slice(*offsets)] for id_, offsets in zip(encoding.ids, encoding.offsets, strict=True) if id_ == unknown
        )
        return sum(sum(_counts(character) for character in span) for span in spans if span != spelled)

    def _is_lost(self, character: str) -> bool:
        if character not in self._lost:
            self._lost[character] = _counts(character) and character not in _MARKS and not self._keeps(character)
        return self._lost[character]

    def _keeps(self, character: str) -> bool:
        normalizer, pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        text = character if normalizer is None else normalizer.normalize_str(character)
        if pre_tokenizer is not None:
            text = "".join(piece for piece, _ in pre_tokenizer.pre_tokenize_str(text))
        left = text.strip(_MARKS)
        return bool(left) and not (self._vanishes and any(not self._knows(symbol) for symbol in left))

    def _knows(self, symbol: str) -> bool:
        """Return whether the model has a token for a symbol wherever in a word it stands."""
        before, after = self._model.get("continuing_subword_prefix") or "", self._model.get("end_of_word_suffix") or ""
        if all(f"{start}{symbol}{end}" in self._vocabulary for start in {"", before} for end in {"", after}):
            return True
        return self._falls_back and all(_byte(value) in self._vocabulary for value in symbol.encode())


def _counts(character: str) -> bool:
    return not character.isspace() and unicodedata.category(character) != "Cc"


def _byte(value: int) -> str:
    return f"<0x{value:02X}>"


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    inner = part.get("normalizers") or part.get("pretokenizers")
    if part["type"] != "Sequence":
        yield part
    for each in inner or ():
        yield from _parts(each)


def _may_remove(part: dict[str, Any]) -> bool:
    """Return whether a normalizer or a pre-tokenizer may take characters away that are no whitespace."""
    kind = part["type"]
    if kind == "Replace":
        return not part["content"]
    if kind in ("StripAccents", "BertNormalizer", "Nmt", "Precompiled", "CharDelimiterSplit"):
        return True
    return part.get("behavior") == "Removed"


def _unknown_of(model: dict[str, Any], vocabulary: dict[str, int]) -> tuple[int, str] | None:
    if model["type"] == "Unigram":
        unknown = model.get("unk_id")
        return None if unknown is None else (int(unknown), str(model["vocab"][unknown][0]))
    token = model.get("unk_token")
    return None if token is None or token not in vocabulary else (vocabulary[token], str(token))


@dataclass(frozen=True)
class EncoderRecipe:
    """What a process must know to encode: `tokenizer` is its JSON, `bos` and `eos` frame a document, `dtype` is that
    of the ids."""

    tokenizer: str
    encode_special_tokens: bool
    bos: tuple[int, ...]
    eos: int
    dtype: str
    holdout: float

    @classmethod
    def of(cls, tokenizer: Any, info: TokenizerInfo, dtype: str, holdout: float) -> EncoderRecipe:
        """Return the recipe of a fast tokenizer of transformers."""
        backend = tokenizer.backend_tokenizer
        special = backend.encode_special_tokens
        return cls(backend.to_str(), special, info.bos_token_ids, info.eos_token_id, dtype, holdout)


@dataclass(frozen=True)
class Work:
    """Texts for one call of the tokenizer: whole documents, or one piece of a long one, and the text before it."""

    texts: list[str]
    is_piece: bool = False
    context: str = ""


@dataclass(frozen=True)
class Encoded:
    """What `Work` became: all ids, one document after another, each framed by BOS and EOS unless it is empty.

    `lengths` counts them by document, BOS and EOS included; `held_out` says which documents are. Both are (documents,).
    `counts` is (documents, 4) int64, the columns of `COUNTED`.
    A piece has no BOS and no EOS and is not said to be held out.
    """

    ids: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    held_out: np.ndarray[Any, np.dtype[np.bool_]]
    counts: np.ndarray[Any, np.dtype[np.int64]]


COUNTED = ("characters", "lost_characters", "special_tokens", "pages")
"""Characters, and those that are lost (both 0 where the tokenizer can spell everything); special tokens in the text;
and 1 for a page of HTML."""
_PAGE = re.compile(r"\ufeff?\s*<(!doctype\s+html|html)\b", re.IGNORECASE)


class Encoder:
    """Encodes with one thread, and without truncation, padding and BPE dropout, whatever the tokenizer was set to."""

    def __init__(self, recipe: EncoderRecipe) -> None:
        self._recipe = recipe
        self._bos = list(recipe.bos)
        self._tokenizer = Tokenizer.from_str(recipe.tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = recipe.encode_special_tokens
        if getattr(self._tokenizer.model, "dropout", None) is not None:
            self._tokenizer.model.dropout = None
        self._spelling = Spelling(self._tokenizer)
        special = [id_ for id_, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]
        self._is_special = np.zeros(max(self._tokenizer.get_vocab().values(), default=0) + 2, dtype=np.bool_)
        self._is_special[special] = True
        self._special_bos, self._special_eos = int(self._is_special[self._bos].sum()), int(self._is_special[recipe.eos])

    def encode(self, work: Work) -> Encoded:
        """Encode texts. Raises ValueError where the tokenizer fails on one."""
        try:
            with _one_thread():
                encodings = self._tokenizer.encode_batch_fast(
                    [work.context + text for text in work.texts], add_special_tokens=False
                )
        except Exception as error:  # `tokenizers` raises plain ones, of an unknown token that is missing, say
            raise ValueError(f"the tokenizer can't encode the text: {error}: choose another tokenizer") from None
        row = array("I")
        lengths = np.zeros(len(encodings), dtype=np.int64)
        counts = np.zeros((len(encodings), len(COUNTED)), dtype=np.int64)
        bos, eos = self._bos, self._recipe.eos
        for i, encoding in enumerate(encodings):
            before, ids = len(row), self._without_context(encoding.ids, work.context)
            if ids and not work.is_piece and ids[: len(bos)] != bos:
                row.fromlist(bos)
                counts[i, 2] -= self._special_bos
            row.fromlist(ids)
            if ids and not work.is_piece:
                row.append(eos)
                counts[i, 2] -= self._special_eos
            lengths[i] = len(row) - before
            counts[i, 3] = not work.context and _PAGE.match(work.texts[i]) is not None
            if self._spelling.can_lose:
                counts[i, :2] = len(work.texts[i]), self._spelling.lost(work.texts[i], ids)
        ids_of_all = np.frombuffer(row, dtype=np.uint32)
        so_far = np.concatenate([[0], np.cumsum(self._is_special[ids_of_all])])
        ends = np.cumsum(lengths)
        counts[:, 2] += so_far[ends] - so_far[ends - lengths]
        held_out = np.zeros(len(encodings), dtype=np.bool_)
        if self._recipe.holdout and not work.is_piece:
            held_out[:] = [is_held_out(text, self._recipe.holdout) for text in work.texts]
        return Encoded(ids_of_all.astype(self._recipe.dtype), lengths, held_out, counts)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text alone, without EOS."""
        with _one_thread():
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _without_context(self, ids: list[int], context: str) -> list[int]:
        if not context:
            return ids
        before = self.ids(context)
        if ids[: len(before)] != before:
            raise ValueError(
                f"a long document can't be tokenised in pieces: after {context[-40:]!r} its tokens depend on text far "
                "from there; cut the document into shorter ones"
            )
        return ids[len(before) :]


def encode_in_order(works: Iterable[Work], recipe: EncoderRecipe, workers: int) -> Iterator[Encoded]:
    """Return what each of `works` becomes, in their order; with one worker in this process.

    At most a few works per worker are taken in advance. Raises ChildProcessError when a worker is killed.
    """
    if workers == 1:
        encoder = Encoder(recipe)
        yield from map(encoder.encode, works)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (recipe,))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for work in works:
            waiting.append(pool.submit(_encode, work))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(
            f"one of {workers} worker processes has died; it may have been killed for want of memory; "
            "run the same command again to resume, with fewer --workers if so"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None
"""A worker process's own."""


def _start_worker(recipe: EncoderRecipe) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the others
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _encoder = Encoder(recipe)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(work: Work) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(work)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """`tokenizers` has threads of its own, and looks at this variable in every call."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
