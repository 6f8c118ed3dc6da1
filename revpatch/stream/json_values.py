"""The values of a JSON file, one at a time, however long the file is."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

_CHARACTERS = 2**18
_SPACE = re.compile(r"[ \t\r\n]*")


class Repeating(dict[str, Any]):
    """An object that has a key more than once, which JSON allows: `times` says how often each. The last value stays."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.times = Counter(key for key, _ in pairs)


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's keys and values as a dict: the `object_pairs_hook` of whatever reads documents."""
    held = dict(pairs)
    return held if len(held) == len(pairs) else Repeating(pairs)


def json_values(file: BinaryIO, where: str) -> Iterator[tuple[str, Any, bool]]:
    """Yield the JSON values of a file with the text of each, and whether it is the only one: the elements of an array,
    or what stands one after another. Holds one at a time, and a buffer.

    The text is decoded with surrogateescape. Raises ValueError where the JSON is broken, as nothing says where the next
    value begins.
    """
    lines = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    scanner = _Scanner(lines, where)
    scanner.skip_space()
    if not scanner.at("["):
        first = scanner.value_or_none()
        if first is None:
            return
        scanner.skip_space()
        second = scanner.value_or_none()
        yield (*first, second is None)
        while second is not None:
            yield (*second, False)
            scanner.skip_space()
            second = scanner.value_or_none()
        return
    scanner.take("[")
    scanner.skip_space()
    while not scanner.at("]"):
        value = scanner.value_or_none()
        if value is None:
            raise scanner.error("the end of the file within the array")
        yield (*value, False)
        scanner.skip_space()
        if not scanner.at("]"):
            scanner.take(",")
            scanner.skip_space()
    scanner.take("]")
    scanner.skip_space()
    if not scanner.ended:
        raise scanner.error("more after the array's end")


class _Scanner:
    """Reads JSON values one by one from a text file, with as much of it in a buffer as the longest value needs."""

    def __init__(self, file: io.TextIOWrapper, where: str) -> None:
        self._file, self._where = file, where
        self._text = file.read(_CHARACTERS).removeprefix("\ufeff")
        self._at, self._before = 0, 0
        self._decoder = json.JSONDecoder(object_pairs_hook=object_of)

    @property
    def ended(self) -> bool:
        return self._at >= len(self._text) and not self._more()

    def error(self, found: str) -> ValueError:
        return ValueError(
            f"{self._where}: expected JSON: objects, or an array of them; found {found}, at character "
            f"{self._before + self._at}; mend the file, or give "
            "it one object a line and the ending .jsonl, so that --on-bad skip can leave a broken one out"
        )

    def at(self, sign: str) -> bool:
        return not self.ended and self._text[self._at] == sign

    def take(self, sign: str) -> None:
        if not self.at(sign):
            found = "the end of the file" if self.ended else repr(self._text[self._at : self._at + 20])
            raise self.error(f"{found} instead of {sign!r}")
        self._at += 1

    def skip_space(self) -> None:
        while not self.ended:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return

    def value_or_none(self) -> tuple[str, Any] | None:
        """Return the next value with its text; None at the end of the file."""
        if self.ended:
            return None
        whole = False
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or whole:
                    text = self._text[self._at : end]
                    self._at = end
                    return text, value
            except (ValueError, RecursionError) as error:  # a plain ValueError: a number of too many digits
                unfinished = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16
                )
                if whole or not unfinished:
                    found = f"{self._text[self._at : self._at + 20]!r} ({error})"
                    raise self.error(f"the end of the file within {found}" if whole and unfinished else found) from None
            whole = not self._more()

    def _more(self) -> bool:
        """Read as much again as there is, and let go of what was taken; False at the end of the file."""
        more = self._file.read(max(_CHARACTERS, len(self._text) - self._at))
        if more:
            self._before += self._at
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)
