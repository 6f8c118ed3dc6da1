"""Documents gathered into work for the tokenizer, each with the place in the corpus where it ends.

A chunk is many short documents, of one input or several, or one piece of a long document, as a tokenizer takes many
times a text's size while it works. A piece ends before a single space between two words. Byte-level BPE tokenizers
split the text there before anything else, so the pieces' tokens, one after another, are those of the whole text. A text
without such a place is cut anywhere: its tokens are the same in every build, and may differ from those of the whole at
the cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from revpatch.stream.documents import BadDocument, Document, Input, Meter, Reading
from revpatch.stream.encode import Work
from revpatch.stream.holdout import is_held_out

CHUNK_DOCUMENTS = 512
CHUNK_CHARACTERS = 2**18
LONG_CHARACTERS = 2**20
"""A text of more characters than this is a long one."""
PIECE_CHARACTERS = 2**18


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


def read_chunks(inputs: Sequence[Input], text_column: str, holdout: float, start: Position) -> Iterator[Chunk]:
    """All chunks from `start` on. Inputs before it are not opened; documents before it are read over."""
    texts: list[str] = []
    characters = 0
    end, before = start, 0
    for end, bytes_read, document, pieces_taken in _read_on(inputs, text_column, start):
        if len(document.text) <= LONG_CHARACTERS:
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
            yield from _pieces(document, end, (before, bytes_read()), holdout, pieces_taken)
            before = bytes_read()
    if texts:
        yield Chunk(Work(texts), end, before)


def _read_on(
    inputs: Sequence[Input], text_column: str, start: Position
) -> Iterator[tuple[Position, Callable[[], int], Document, int]]:
    """Each document, the position after it, bytes read so far, and how many of its pieces have been taken before."""
    before = sum(found.bytes or 0 for found in inputs[: start.input])
    for number in range(start.input, len(inputs)):
        here = start if number == start.input else Position(number)
        meter = Meter()
        bytes_read = partial(_bytes_read, before, meter if inputs[number].bytes is not None else None)
        documents = inputs[number].read(Reading(text_column, here.documents, meter=meter))
        for taken, document in enumerate(documents, here.documents + 1):
            if isinstance(document, BadDocument):
                raise ValueError(document.reason)
            pieces_taken = here.pieces if taken == here.documents + 1 else 0
            yield Position(number, taken), bytes_read, document, pieces_taken
        before += inputs[number].bytes or 0


def _bytes_read(before: int, meter: Meter | None) -> int:
    return before + (meter.bytes if meter is not None else 0)


def _pieces(
    document: Document, end: Position, bytes_read: tuple[int, int], holdout: float, taken: int
) -> Iterator[Chunk]:
    held_out = is_held_out(document.text, holdout)
    pieces = pieces_of(document.text)
    for number, piece in enumerate(pieces, 1):
        last = number == len(pieces)
        if number > taken:
            after = end if last else Position(end.input, end.documents - 1, number)
            share = (bytes_read[1] - bytes_read[0]) * number // len(pieces)
            yield Chunk(Work([piece], is_piece=True), after, bytes_read[0] + share, held_out, last)


def pieces_of(text: str) -> list[str]:
    """Cut a text into pieces for the tokenizer of at most PIECE_CHARACTERS."""
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = _place_to_cut(text, start, start + PIECE_CHARACTERS)
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def _place_to_cut(text: str, start: int, limit: int) -> int:
    """The last place up to `limit` where a single space stands between two words, or `limit`."""
    place = text.rfind(" ", start + 1, limit)
    while place > 0:
        if not text[place - 1].isspace() and not text[place + 1].isspace():
            return place
        place = text.rfind(" ", start + 1, place)
    return limit
