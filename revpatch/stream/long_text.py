"""Texts that are never in the memory whole: read in parts, and cut into pieces for the tokenizer.

A piece ends before a single space between two words. Byte-level BPE tokenizers split the text there before anything
else, so the pieces' tokens, one after another, are those of the whole text. A text without such a place is cut
anywhere: its tokens are the same in every build, and may differ from those of the whole at the cuts.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO

from revpatch.stream.holdout import is_held_out_in_parts

LONG_BYTES = 2**20
"""A text of more bytes than this is a long one."""
PIECE_CHARACTERS = 2**18


class LongText:
    """The text of a file that can be read several times.

    Args:
        open_file: opens it at its beginning, for bytes of UTF-8.
        where: what messages call it.
        byte_order_mark: leave one out at the beginning, if it is there.
    """

    def __init__(
        self,
        open_file: Callable[[], AbstractContextManager[BinaryIO | io.FileIO]],
        where: str,
        *,
        byte_order_mark: bool = False,
    ) -> None:
        self._open = open_file
        self._where = where
        self._encoding = "utf-8-sig" if byte_order_mark else "utf-8"

    def parts(self) -> Iterator[str]:
        """The text in order, in parts that are cut anywhere. Raises ValueError where it is not UTF-8."""
        decoder = codecs.getincrementaldecoder(self._encoding)()
        offset, held = 0, 0
        with self._open() as file:
            while True:
                data = file.read(PIECE_CHARACTERS)
                try:
                    part = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise not_utf8(error, self._where, offset - held) from None
                if part:
                    yield part
                if not data:
                    return
                offset += len(data)
                held = len(decoder.getstate()[0])

    def is_held_out(self, holdout: float) -> bool:
        """The side of the holdout, by the same hash as a short text's. Reads it all."""
        return is_held_out_in_parts(self.parts(), holdout)

    def pieces(self) -> Iterator[str]:
        """The text in order, in pieces for the tokenizer of at most PIECE_CHARACTERS."""
        rest = ""
        for part in self.parts():
            rest += part
            while len(rest) > PIECE_CHARACTERS:
                cut = _place_to_cut(rest, PIECE_CHARACTERS)
                yield rest[:cut]
                rest = rest[cut:]
        if rest:
            yield rest


def not_utf8(error: UnicodeDecodeError, where: str, offset: int = 0) -> ValueError:
    """What is to be raised for bytes that are no text; `offset` is where the decoded bytes began."""
    return ValueError(
        f"{where}: expected UTF-8, found the byte 0x{error.object[error.start]:02x} at offset {offset + error.start}; "
        "convert it, for example: iconv -f latin1 -t utf-8"
    )


def _place_to_cut(text: str, limit: int) -> int:
    """The last place up to `limit` where a single space stands between two words, or `limit`."""
    place = text.rfind(" ", 1, limit)
    while place > 0:
        if not text[place - 1].isspace() and not text[place + 1].isspace():
            return place
        place = text.rfind(" ", 1, place)
    return limit
