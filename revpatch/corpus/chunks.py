"""Documents gathered into work for the tokenizer, each with the place in the corpus where it ends.

A chunk is many short documents, of one input or several, or one piece of a long one, as the tokenizer takes many
times a text's size while it works. Documents that can't be read are left out and counted where that is asked for.

The pieces' tokens, one after another, are those of the whole text, whatever the tokenizer does at a text's ends and
between words. Each piece is tokenised after a context, the text before it, and the context's own tokens are left out. A
cut is made only where the tokens of what lies before it don't change with what comes after, which is tried at that very
place. A text without such a place is not cut.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path

from revpatch.corpus.documents import BadDocument, ByteCounter, Document, Input, Reading, file_identity
from revpatch.corpus.encode import Work, is_held_out, place_of_tail

CHUNK_DOCUMENTS = 512
CHUNK_CHARACTERS = 2**18
LONG_CHARACTERS = 2**20
"""A text of more characters than this is a long one."""
PIECE_CHARACTERS = 2**18
CONTEXT_CHARACTERS = 1000
_TRIES = 32
_PLACES = re.compile(r"(?<=\S)(?= \S)|(?<=\n)(?=\S)")
"""Before a single space between two words, and after the end of a line: most tokenizers begin a token there."""
_REASON_CHARACTERS = 300

Encode = Callable[[str], list[int]]


class CorpusError(ValueError):
    """What is wrong is the corpus as a whole, so nothing of the build is worth keeping."""


class BadDocumentError(ValueError):
    """A document can't be read, and it is not to be left out."""


class SourceChangedError(ValueError):
    """A source was written to while it was read."""


class ReadBeforeError(ValueError):
    """A source is not what it was in what an earlier call had read of it."""


@dataclass(frozen=True)
class Position:
    """Where reading resumes: the number of the input, documents taken of it (bad ones included), and pieces of the
    document after them.

    `digest` is a hash of what was taken of that input, all of the document in pieces included. `lone` is where the
    document lies that is held out by its tail: the number of its input, and of the document in it, from 1.
    """

    input: int = 0
    documents: int = 0
    pieces: int = 0
    digest: str = ""
    lone: Sequence[int] = ()


@dataclass(frozen=True)
class TextChunk:
    """Work, the position after it, and bytes read up to there.

    `bad` are the documents left out: how many texts of the work come before each, and what is told of it. Of a piece,
    `held_out` is its side, and `is_last_piece` says that its document ends there, or its document's part of that side.
    """

    work: Work
    end: Position
    bytes_read: int
    bad: tuple[tuple[int, str], ...] = ()
    held_out: bool = False
    is_last_piece: bool = False


@dataclass(frozen=True)
class ChunkReading:
    """What `read_chunks` is told: as `Reading`, and `skip_bad` to leave out what can't be read, `verify` to check what
    lies before the start, and `encode`, by which places to cut long documents are found."""

    text_column: str
    separators: tuple[str, ...]
    holdout: float
    skip_bad: bool
    verify: bool
    encode: Encode


@dataclass(frozen=True)
class _Read:
    """A document, where it lies, the digest of its input up to its end, and pieces of it that were taken before."""

    document: Document | BadDocument
    input: int
    number: int
    digest: str
    pieces_taken: int
    source: str
    bytes_read: Callable[[], int]


def read_chunks(inputs: Sequence[Input], reading: ChunkReading, start: Position) -> Iterator[TextChunk]:
    """Yield all chunks from `start` on. Inputs before it are not opened; documents before it are read over.

    Raises what readers do; BadDocumentError for a document that can't be read, unless these are left out;
    ReadBeforeError and SourceChangedError; CorpusError when the only document of a corpus is that no more.
    """
    reads, lone = _read_on(inputs, reading, start), tuple(start.lone)
    if reading.holdout and start == Position():
        lone, reads = _find_lone(reads)
    texts: list[str] = []
    bad: list[tuple[int, str]] = []
    characters, end, before = 0, start, 0

    def gathered() -> Iterator[TextChunk]:
        nonlocal characters
        if texts or bad:
            yield TextChunk(Work(texts.copy()), end, before, tuple(bad))
        texts.clear()
        bad.clear()
        characters = 0

    for read in reads:
        document, is_lone = read.document, lone == (read.input, read.number)
        text = document.text if isinstance(document, Document) and not is_blank(document.text) else ""
        if isinstance(document, BadDocument):
            bad.append((len(texts), _told(document, read.source)))
        elif lone and text and not is_lone:
            raise CorpusError(
                f"{read.source}: the corpus had one document when this build began, so the end of it was held out; "
                "now it has more: run the same command again, which begins anew"
            )
        elif is_lone or len(text) > LONG_CHARACTERS:
            yield from gathered()
            yield from _pieces(text, read, reading, lone, before)
        else:
            texts.append(text)
            characters += len(text)
        end, before = Position(read.input, read.number, 0, read.digest, lone), read.bytes_read()
        if len(texts) + len(bad) >= CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield from gathered()
    yield from gathered()


def is_blank(text: str) -> bool:
    """Return whether there is nothing but white space in a text."""
    return not text or text.isspace()


def _read_on(inputs: Sequence[Input], reading: ChunkReading, start: Position) -> Iterator[_Read]:
    before = sum(found.bytes or 0 for found in inputs[: start.input])
    for number in range(start.input, len(inputs)):
        found, here = inputs[number], start if number == start.input else Position(number)
        meter = ByteCounter()
        bytes_read = partial(_bytes_read, before, meter if found.bytes is not None else None)
        verify = reading.verify and bool(here.digest)
        told = Reading(reading.text_column, 0 if verify else here.documents, reading.separators, meter)
        documents = found.read(told)
        if verify:
            documents = _verified(documents, here, found.name)
        digest = here.digest
        for taken, document in enumerate(documents, here.documents + 1):
            if isinstance(document, BadDocument) and not reading.skip_bad:
                raise BadDocumentError(document.reason)
            is_begun = bool(here.pieces) and taken == here.documents + 1
            digest = digest if is_begun else _chained(digest, document)
            pieces_taken = here.pieces if is_begun else 0
            yield _Read(document, number, taken, digest, pieces_taken, found.name, bytes_read)
        _check_unchanged(found)
        before += found.bytes or 0


def _verified(
    documents: Iterator[Document | BadDocument], here: Position, name: str
) -> Iterator[Document | BadDocument]:
    """Read over what was taken before. Raises ReadBeforeError unless it has the digest that it had."""
    digest, taken, begun = "", 0, None
    wanted = here.documents + bool(here.pieces)
    for document in documents:
        digest, taken = _chained(digest, document), taken + 1
        if taken == wanted:
            begun = document
            break
    if digest != here.digest:
        raise ReadBeforeError(
            f"{name}: the first {wanted:,} documents of it, which had been read when this build was interrupted, are "
            "not what they were"
        )
    return chain([begun] if here.pieces and begun is not None else [], documents)


def _chained(digest: str, document: Document | BadDocument) -> str:
    """Return the digest of documents one after another, by that of those before."""
    text, person = (document.text, b"") if isinstance(document, Document) else (document.reason, b"bad")
    data = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16, key=bytes.fromhex(digest), person=person).hexdigest()


def _check_unchanged(found: Input) -> None:
    """Raise SourceChangedError for a file that was written to while it was read."""
    if "path" not in found.identity:
        return
    try:
        now = file_identity(Path(found.identity["path"]))
    except OSError:
        now = None
    if now != {key: found.identity[key] for key in ("path", "bytes", "mtime_ns")}:
        raise SourceChangedError(
            f"{found.name}: changed while it was read; let what writes to it come to its end, and run the same command "
            "again"
        )


def _bytes_read(before: int, meter: ByteCounter | None) -> int:
    return before + (meter.bytes if meter is not None else 0)


def _find_lone(reads: Iterator[_Read]) -> tuple[tuple[int, ...], Iterator[_Read]]:
    """Return where the only document with any text lies, or () if there are more or none; and all reads again."""
    seen, places = [], []
    for read in reads:
        seen.append(read)
        if isinstance(read.document, Document) and not is_blank(read.document.text):
            places.append((read.input, read.number))
            if len(places) == 2:
                return (), chain(seen, reads)
    return (places[0] if places else ()), iter(seen)


def _pieces(text: str, read: _Read, reading: ChunkReading, lone: tuple[int, ...], before: int) -> Iterator[TextChunk]:
    """Yield a long document in pieces that go to its side; or the tail of the only one, held out, and then its head.

    The tail comes first, as reading ends where the training side is full.
    """
    parts: Iterable[tuple[str, bool]] = [(text, is_held_out(text, reading.holdout))]
    if lone:
        cut = place_of_tail(text, reading.holdout)
        parts = [(text[cut:], True), (text[:cut], False)]
    works = [
        (work, held_out, last)
        for part, held_out in parts
        for work, last in works_of(part, LONG_CHARACTERS, reading.encode)
    ]
    taken = read.bytes_read() - before
    for number, (work, held_out, last) in enumerate(works, 1):
        if number > read.pieces_taken:
            end = Position(read.input, read.number - 1, number, read.digest, lone)
            if number == len(works):
                end = Position(read.input, read.number, 0, read.digest, lone)
            yield TextChunk(work, end, before + taken * number // len(works), (), held_out, last)


def _told(document: BadDocument, source: str) -> str:
    """Return the reason as manifests have it: without the folders of this machine, and not too long."""
    reason = document.reason.replace(source, source.rpartition("/")[2])
    reason = reason.encode("utf-8", "backslashreplace").decode()
    return reason if len(reason) <= _REASON_CHARACTERS else reason[: _REASON_CHARACTERS - 3] + "..."


def works_of(text: str, whole_up_to: int, encode: Encode) -> Iterator[tuple[Work, bool]]:
    """Yield the work for each piece of a text, and whether it is the last one."""
    cuts = [0, *(cuts_of(text, encode) if len(text) > whole_up_to else []), len(text)]
    for start, end in pairwise(cuts):
        context = text[max(0, start - CONTEXT_CHARACTERS) : start]
        yield Work([text[start:end]], is_piece=True, context=context), end == len(text)


def cuts_of(text: str, encode: Encode) -> list[int]:
    """Return where to cut a text into pieces of at most PIECE_CHARACTERS, or of more where no place before will do."""
    cuts: list[int] = []
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        # Two characters more, as what follows a place is looked at.
        nearest = [found.start() for found in _PLACES.finditer(text, start + PIECE_CHARACTERS // 2, limit + 2)]
        nearest = [place for place in nearest if place <= limit]
        later = (found.start() for found in _PLACES.finditer(text, limit + 1))
        places = chain(islice(reversed(nearest), _TRIES), islice(later, _TRIES))
        cut = next((place for place in places if _is_clean(text, place, encode)), None)
        if cut is None:
            break
        cuts.append(cut)
        start = cut
    return cuts


def _is_clean(text: str, place: int, encode: Encode) -> bool:
    """Return whether the tokens before a place are the same with what comes after it and without."""
    before = text[max(0, place - CONTEXT_CHARACTERS) : place]
    left, both = encode(before), encode(before + text[place : place + CONTEXT_CHARACTERS])
    return both[: len(left)] == left
