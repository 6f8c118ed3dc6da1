"""Texts to token ids: in this process, or in processes of their own, with the same result in the same order.

Worker processes import this file, which therefore imports little: no torch, no transformers. They end when the process
that started them does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
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


@dataclass(frozen=True)
class EncoderRecipe:
    """What a process must know to encode: `tokenizer` is its JSON, `dtype` that of the ids."""

    tokenizer: str
    encode_special_tokens: bool
    eos: int
    dtype: str
    holdout: float

    @classmethod
    def of(cls, tokenizer: Any, eos: int, dtype: str, holdout: float) -> EncoderRecipe:
        """The recipe of a fast tokenizer of transformers."""
        backend = tokenizer.backend_tokenizer
        return cls(backend.to_str(), backend.encode_special_tokens, eos, dtype, holdout)


@dataclass(frozen=True)
class Work:
    """Texts for one call of the tokenizer: whole documents, or one piece of a long one, and the text before it."""

    texts: list[str]
    is_piece: bool = False
    context: str = ""


@dataclass(frozen=True)
class Encoded:
    """What `Work` became: all ids, one document after another, each with EOS at its end unless it is empty.

    `lengths` counts them by document, EOS included; `held_out` says which documents are. Both are (documents,).
    A piece has no EOS and is not said to be held out.
    """

    ids: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    held_out: np.ndarray[Any, np.dtype[np.bool_]]


class Encoder:
    """Encodes with one thread, and without truncation and padding, whatever the tokenizer was set to."""

    def __init__(self, recipe: EncoderRecipe) -> None:
        self._recipe = recipe
        self._tokenizer = Tokenizer.from_str(recipe.tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = recipe.encode_special_tokens

    def encode(self, work: Work) -> Encoded:
        with _one_thread():
            encodings = self._tokenizer.encode_batch_fast(
                [work.context + text for text in work.texts], add_special_tokens=False
            )
        row = array("I")
        lengths = np.zeros(len(encodings), dtype=np.int64)
        for i, encoding in enumerate(encodings):
            before = len(row)
            row.fromlist(self._without_context(encoding.ids, work.context))
            if len(row) > before and not work.is_piece:
                row.append(self._recipe.eos)
            lengths[i] = len(row) - before
        held_out = np.zeros(len(encodings), dtype=np.bool_)
        if self._recipe.holdout and not work.is_piece:
            held_out[:] = [is_held_out(text, self._recipe.holdout) for text in work.texts]
        return Encoded(np.frombuffer(row, dtype=np.uint32).astype(self._recipe.dtype), lengths, held_out)

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
