"""Documents gathered into work for the tokenizer, each with the place in the corpus where it ends.

A chunk is many short documents, of one input or several, or one piece of a long document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from revpatch.stream.documents import Document, Input, LongDocument, Meter, Reading
from revpatch.stream.encode import Work

CHUNK_DOCUMENTS = 512
CHUNK_CHARACTERS = 2**18


@dataclass(frozen=True)
class Position:
    """Where reading goes on: the number of the input, documents taken of it, and pieces of the document after them."""

    input: int = 0
    documents: int = 0
    pieces: int = 0


@dataclass(frozen=True)
class Chunk:
    """Work, the position after it, and bytes read up to there; of a piece, the long document's side and its end."""

    work: Work
    end: Position
    bytes_read: int
    held_out: bool = False
    is_last_piece: bool = False


def read_chunks(
    inputs: Sequence[Input], text_column: str, spool: Path, holdout: float, start: Position
) -> Iterator[Chunk]:
    """All chunks from `start` on. Inputs before it are not opened; documents before it are read over."""
    texts: list[str] = []
    characters = 0
    end, before = start, 0
    for end, bytes_read, document, pieces_taken in _read_on(inputs, text_column, spool, start):
        if isinstance(document, Document):
            before = bytes_read()
            texts.append(document.text)
            characters += len(document.text)
            if len(texts) == CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
                yield Chunk(Work(texts), end, before)
                texts, characters = [], 0
        else:
            if texts:
                yield Chunk(Work(texts), Position(end.input, end.documents - 1), before)
                texts, characters = [], 0
            yield from _pieces(document, end, bytes_read, holdout, pieces_taken)
    if texts:
        yield Chunk(Work(texts), end, before)


def _read_on(
    inputs: Sequence[Input], text_column: str, spool: Path, start: Position
) -> Iterator[tuple[Position, Callable[[], int], Document | LongDocument, int]]:
    """Each document, the position after it, bytes read so far, and how many of its pieces have been taken before."""
    before = sum(found.bytes or 0 for found in inputs[: start.input])
    for number in range(start.input, len(inputs)):
        here = start if number == start.input else Position(number)
        meter = Meter()
        bytes_read = partial(_bytes_read, before, meter if inputs[number].bytes is not None else None)
        documents = inputs[number].read(Reading(text_column, spool, here.documents, meter))
        for taken, document in enumerate(documents, here.documents + 1):
            pieces_taken = here.pieces if taken == here.documents + 1 else 0
            yield Position(number, taken), bytes_read, document, pieces_taken
        before += inputs[number].bytes or 0


def _bytes_read(before: int, meter: Meter | None) -> int:
    return before + (meter.bytes if meter is not None else 0)


def _pieces(
    document: LongDocument, end: Position, bytes_read: Callable[[], int], holdout: float, taken: int
) -> Iterator[Chunk]:
    held_out = bool(holdout) and document.text.is_held_out(holdout)
    pieces = document.text.pieces()
    piece = next(pieces, "")
    number = 0
    while True:
        number += 1
        following = next(pieces, None)
        last = following is None
        if number > taken:
            after = end if last else Position(end.input, end.documents - 1, number)
            yield Chunk(Work([piece], is_piece=True), after, bytes_read(), held_out, last)
        if following is None:
            return
        piece = following
