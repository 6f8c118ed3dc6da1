"""Long texts cut into pieces for the tokenizer, which takes many times a text's size while it works.

The pieces' tokens, one after another, are those of the whole text, whatever the tokenizer does at a text's ends and
between words. Each piece is tokenised after a context, the text before it, and the context's own tokens are left out. A
cut is made only where the tokens of what lies before it don't change with what comes after, which is tried at that very
place. A text without such a place is not cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain, islice, pairwise

from revpatch.stream.encode import Work

PIECE_CHARACTERS = 2**18
CONTEXT_CHARACTERS = 1000
_TRIES = 32
_PLACES = re.compile(r"(?<=\S)(?= \S)|(?<=\n)(?=\S)")
"""Before a single space between two words, and after the end of a line: most tokenizers begin a token there."""

Encode = Callable[[str], list[int]]


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
