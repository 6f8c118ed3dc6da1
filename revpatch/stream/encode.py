"""Texts to token ids: in this process, or in processes of their own, with the same result in the same order.

Worker processes import this file, which therefore imports little: no torch, no transformers. They end when the process
that started them does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from revpatch.stream.holdout import is_held_out
from revpatch.stream.manifest import TokenizerInfo
from revpatch.stream.spelling import Spelling


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
        """The recipe of a fast tokenizer of transformers."""
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
    """What each of `works` becomes, in their order; with one worker in this process.

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
            "run the same command again to go on, with fewer --workers if so"
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
