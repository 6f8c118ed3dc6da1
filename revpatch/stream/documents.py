"""What readers and the builder speak of: a document, one that can't be read, and an input that gives both in order.

Also what all readers say of a row: its text is missing, null, no text, or a chat.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revpatch.stream.utf8 import check_characters, decoded


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


_ANOTHER_FIELD = "name the field that holds the text with text_column (--text-column)"
CHAT_KEYS = ({"role", "content"}, {"from", "value"})


def readable(name: str, read: Callable[[], Document]) -> Document | BadDocument:
    """Return what `read` returns or, where it raises ValueError, a BadDocument that says so."""
    try:
        return read()
    except ValueError as error:
        return BadDocument(name, str(error))


def excerpt(text: str) -> str:
    """Return the beginning of a text, as error messages quote it."""
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


def document_of_row(row: Mapping[str, Any], where: str, name: str, text_column: str) -> Document:
    """Return the text of a row, named by its "id" if that is a string.

    Raises ValueError where the field is missing or is no text that UTF-8 can hold.
    """
    if text_column not in row:
        chats = {column: value[0].keys() for column, value in row.items() if is_chat(value)}
        raise missing_column(where, text_column, list(row), chats)
    text = check_text(row[text_column], where, text_column)
    identifier = row.get("id")
    return Document(identifier if isinstance(identifier, str) and identifier else name, text)


def check_text(value: Any, where: str, text_column: str) -> str:
    """Return `value` if it is text that UTF-8 can hold, or bytes of such text. Raises ValueError if not."""
    place = f"{where}: field {text_column!r}"
    if isinstance(value, bytes):
        return decoded(value, place)
    if is_chat(value):
        raise ValueError(
            f"{place}: expected text, found a chat of {len(value)} messages; {chat_remedy(text_column, value[0])}"
        )
    if value is None:
        raise ValueError(f"{place}: expected text, found null (NoneType); leave such rows out, or give --on-bad skip")
    if not isinstance(value, str):
        found = f"{type(value).__name__} {excerpt(json.dumps(value, default=repr))}"
        parts = isinstance(value, list) and value and all(isinstance(part, str) for part in value)
        remedy = "join its strings to one beforehand, or " if parts else ""
        raise ValueError(f"{place}: expected text, found {found}; {remedy}{_ANOTHER_FIELD}")
    try:
        data = value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        raise ValueError(
            f"{place}: expected characters, found half of a surrogate pair "
            f"(\\u{ord(value[error.start]):04x}) at character {error.start}; take it out of the line"
        ) from None
    check_characters(data, place)
    return value


def missing_column(
    where: str, text_column: str, columns: list[str], chats: Mapping[str, Iterable[str]] | None = None
) -> ValueError:
    """Return what is to be raised when a row has no field of that name.

    `chats` are the columns that hold messages, with the keys of these.
    """
    found = ", ".join(excerpt(str(column)) for column in columns[:20]) or "no field"
    remedy = _ANOTHER_FIELD
    for chat, keys in (chats or {}).items():
        remedy = f"{chat!r} is a chat: {chat_remedy(chat, keys)}"
    return ValueError(f"{where}: expected the field {text_column!r}, found {found}; {remedy}")


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of messages, as chat data sets hold them."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and any(keys <= message.keys() for keys in CHAT_KEYS) for message in value)
    )


def chat_remedy(column: str, keys: Iterable[str]) -> str:
    """Return how to make text of a column of messages that have these keys: a line of Python that writes JSONL."""
    messages = f'row["{column}"]'
    if "role" not in keys:
        roles = '{"human": "user", "gpt": "assistant"}'
        messages = f'[{{"role": {roles}.get(m["from"], m["from"]), "content": m["value"]}} for m in {messages}]'
    return (
        "make text of it with the chat template of the model that is to be patched, and build from chat.jsonl: python "
        "-c 'from datasets import load_dataset; from transformers import AutoTokenizer; t = "
        'AutoTokenizer.from_pretrained("MODEL"); load_dataset("json", data_files="FILE", split="train").map('
        f'lambda row: {{"text": t.apply_chat_template({messages}, tokenize=False)}}).select_columns("text")'
        '.to_json("chat.jsonl")\' ("parquet" in the place of "json" where FILE is one)'
    )


def file_identity(path: Path) -> dict[str, Any]:
    """Return where a file is, how long, and when it was changed last."""
    stat = path.stat()
    return {"path": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
