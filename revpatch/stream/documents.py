"""What readers and the builder speak of: a document, one that can't be read, and an input that gives both in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Document:
    """A text and a name for it: the line's "id" where it has one, else 'file' or 'file:line'."""

    id: str
    text: str


@dataclass(frozen=True)
class BadDocument:
    """A document that can't be read, where those after it can: `reason` names file, place and remedy.

    A reader that can't read any further raises ValueError instead.
    """

    id: str
    reason: str


@dataclass
class Meter:
    """How many bytes of an input its reader has taken; of a compressed file, compressed ones."""

    bytes: int = 0


@dataclass(frozen=True)
class Reading:
    """What a reader is told.

    `separators` are strings that stand between documents in plain text, such as `<|endoftext|>`. The first `skip`
    documents, those that can't be read included, are passed over.
    """

    text_column: str
    skip: int = 0
    separators: tuple[str, ...] = ()
    meter: Meter = field(default_factory=Meter)


@dataclass(frozen=True)
class Input:
    """Something that gives documents in an order of its own: a file, a tar, a split of a data set.

    `identity` are plain values that differ when the documents may differ. `bytes` is None where nobody knows.
    """

    name: str
    identity: dict[str, Any]
    bytes: int | None
    read: Callable[[Reading], Iterator[Document | BadDocument]]


def excerpt(text: str) -> str:
    """The beginning of a text, as error messages quote it."""
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


def check_text(value: Any, where: str, text_column: str) -> str:
    """`value` if it is text that UTF-8 can hold; raises ValueError if not."""
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: field {text_column!r}: expected text, found {type(value).__name__} "
            f"{excerpt(json.dumps(value, default=repr))}; "
            "name the field that holds the text with text_column (--text-column)"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        raise ValueError(
            f"{where}: field {text_column!r}: expected characters, found half of a surrogate pair "
            f"(\\u{ord(value[error.start]):04x}) at character {error.start}; take it out of the line"
        ) from None
    return value


def missing_column(where: str, text_column: str, columns: list[str]) -> ValueError:
    """What is to be raised when a row has no field of that name."""
    return ValueError(
        f"{where}: expected the field {text_column!r}, found {', '.join(map(repr, columns)) or 'no field'}; "
        "name the field that holds the text with text_column (--text-column)"
    )


def file_identity(path: Path) -> dict[str, Any]:
    """Where a file is, how long, and when it was changed last."""
    stat = path.stat()
    return {"path": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
