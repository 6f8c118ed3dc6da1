"""Finds the text in one JSON object that is too long for the memory, without ever holding it.

The object is read in windows. The string of the field that is wanted goes to a file as UTF-8; all other values are
passed over: their strings and brackets are followed, and nothing else in them is checked.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import Any, BinaryIO

from revpatch.stream.documents import check_text, excerpt, missing_column
from revpatch.stream.long_text import not_utf8

WINDOW_BYTES = 2**16

# A string up to its end, or to an escape that may go on past the window. The two halves of a surrogate pair stay
# together. No part of it can be matched in two ways, so nothing is ever tried twice.
_STRING = re.compile(
    r'(?:[^"\\]+|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\u[0-9a-fA-F]{4}|(?=[^\\]|\\[^u])))*"
)
_LONGEST_ESCAPE = len(r"\ud83d\ude00")
_SCALAR = re.compile(r"[^\s,}\]]*")
_SPACE = re.compile(r"[ \t\r\n]*")
_NO_STRUCTURE = re.compile(r'[^"\[\]{}]*')


class _Broken(Exception):
    """The object is no JSON; the message says what was found."""


def scan_object(
    read: Callable[[int], bytes], spool: BinaryIO, where: str, text_column: str, first: bool
) -> dict[str, Any] | None:
    """Write the field `text_column` to `spool` and return the "id", if it is a short string, as {"id": ...}.

    `read(n)` gives the next bytes, at most n, and none at the object's end. None is returned for blank input.
    A byte order mark is left out where it is the `first` thing of a file. Raises ValueError as for a short line.
    """
    window = _Window(read, where, first)
    try:
        return _scan(window, spool, where, text_column)
    except _Broken as error:
        raise ValueError(
            f"{where}: expected one JSON object, found {excerpt(window.beginning)} ({error}); "
            "mend the line; an object must not be spread over lines"
        ) from None


def _scan(window: _Window, spool: BinaryIO, where: str, text_column: str) -> dict[str, Any] | None:
    if window.blank():
        return None
    if window.peek() != "{":
        raise ValueError(
            f"{where}: expected an object with the field {text_column!r}, found {excerpt(window.beginning)}; "
            "mend the line"
        )
    found: dict[str, Any] = {}
    columns: list[str] = []
    window.expect("{")
    while window.peek() != "}":
        if columns:
            window.expect(",")
        columns.append(_short_string(window))
        window.expect(":")
        if columns[-1] == text_column:
            _spool_text(window, spool, where, text_column)
        elif columns[-1] == "id" and window.peek() == '"':
            found["id"] = _short_string(window)
        else:
            _pass_over(window)
    window.expect("}")
    if window.peek():
        raise _Broken(f"after its end stands {excerpt(window.text[window.at : window.at + 20])}")
    if text_column not in columns:
        raise missing_column(where, text_column, columns)
    return found


class _Window:
    """The characters from `at` on, as far as they have been read."""

    def __init__(self, read: Callable[[int], bytes], where: str, first: bool) -> None:
        self.text = ""
        self.at = 0
        self._read = read
        self._where = where
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._offset = 0
        self.more()
        if first:
            self.text = self.text.removeprefix("\ufeff")
        self.beginning = self.text[:80]

    def more(self) -> bool:
        """Read on, and let go of what is behind `at`. False at the end."""
        data = self._read(WINDOW_BYTES)
        held = len(self._decoder.getstate()[0])
        try:
            part = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise not_utf8(error, self._where, self._offset - held) from None
        self._offset += len(data)
        self.text = self.text[self.at :] + part
        self.at = 0
        return bool(data)

    def peek(self) -> str:
        """The next character that is no space, or '' at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def blank(self) -> bool:
        """Whether there is nothing but spaces, of any kind, as `str.strip` has it."""
        while not self.text[self.at :].strip():
            self.at = len(self.text)
            if not self.more():
                return True
        return False

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise _Broken(f"expected {character!r}, found {found!r}" if found else "it is cut short")
        self.at += 1


def _strings(window: _Window) -> Any:
    """The string that begins here, in decoded parts."""
    window.expect('"')
    while True:
        match = _STRING.match(window.text, window.at)
        assert match is not None
        raw, window.at = match.group(), match.end()
        if raw:
            try:
                yield json.loads(f'"{raw}"')
            except ValueError as error:
                raise _Broken(str(error)) from None
        if window.text.startswith('"', window.at):
            window.at += 1
            return
        if len(window.text) - window.at >= _LONGEST_ESCAPE:
            raise _Broken(f"no such escape: {excerpt(window.text[window.at : window.at + 6])}")
        if not window.more():
            raise _Broken("a string is not ended")


def _short_string(window: _Window) -> str:
    if window.peek() != '"':
        window.expect('"')
    return "".join(_strings(window))


def _spool_text(window: _Window, spool: BinaryIO, where: str, text_column: str) -> None:
    if window.peek() != '"':
        _fail_not_text(window, where, text_column)
    spool.seek(0)
    spool.truncate()  # of a field that is there twice, the last one counts, as in json.loads
    for part in _strings(window):
        spool.write(check_text(part, where, text_column).encode("utf-8"))


def _fail_not_text(window: _Window, where: str, text_column: str) -> None:
    if window.peek() in "[{":
        value: Any = [] if window.peek() == "[" else {}
    else:
        value = _scalar(window)
    check_text(value, where, text_column)


def _scalar(window: _Window) -> Any:
    while len(window.text) - window.at < 100 and window.more():
        pass
    match = _SCALAR.match(window.text, window.at)
    assert match is not None
    try:
        value = json.loads(match.group())
    except ValueError as error:
        raise _Broken(str(error)) from None
    window.at = match.end()
    return value


def _pass_over(window: _Window) -> None:
    """Go to the end of the value that begins here."""
    closing: list[str] = []
    while True:
        character = window.peek()
        if not character:
            raise _Broken("it is cut short")
        if character == '"':
            for _ in _strings(window):
                pass
        elif character in "[{":
            closing.append("]" if character == "[" else "}")
            window.at += 1
        elif character in "]}":
            window.expect(closing.pop() if closing else "a value")
        elif closing:
            match = _NO_STRUCTURE.match(window.text, window.at)
            assert match is not None
            window.at = match.end()
        else:
            _scalar(window)
        if not closing:
            return
