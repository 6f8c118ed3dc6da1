"""Documents out of parquet: one a row of a column of text, or of bytes that are text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from revpatch.stream.documents import (
    CHAT_KEYS,
    BadDocument,
    Document,
    Reading,
    chat_remedy,
    check_text,
    missing_column,
    readable,
)
from revpatch.stream.utf8 import found_instead

_ROWS = 128
_BUFFER = 2**20  # without one a whole column of a row group is held, compressed


def read_parquet(path: Path, reading: Reading) -> Iterator[Document | BadDocument]:
    """Yield one document a row.

    Raises ValueError for a file that is broken, or whose column is missing or of a type that is no text.
    """
    size, skip = path.stat().st_size, reading.skip
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            _check_column(file.schema_arrow, path, reading.text_column)
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if rows <= skip:
                    row, skip = row + rows, skip - rows
                    continue
                for value in _values(file, group, reading.text_column):
                    row += 1
                    if skip:
                        skip -= 1
                        continue
                    yield _document(value, f"{path}, row {row}", f"{path.name}:{row}", reading.text_column)
                    reading.meter.bytes = size * row // file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        with path.open("rb") as again:
            known = found_instead(again.read(64))
        if known is None or known[0] == "parquet":
            known = (f"a broken one ({error})", "copy it again")
        raise ValueError(f"{path}: expected a parquet file, found {known[0]}; {known[1]}") from error


def _document(value: bytes | None, where: str, name: str, text_column: str) -> Document | BadDocument:
    return readable(name, lambda: Document(name, check_text(value, where, text_column)))


def _check_column(schema: Any, path: Path, text_column: str) -> None:
    chats = {field.name: keys for field in schema if (keys := _keys_of_messages(field.type))}
    if text_column not in schema.names:
        raise missing_column(str(path), text_column, schema.names, chats)
    found = schema.field(text_column).type
    if pyarrow.types.is_dictionary(found):
        found = found.value_type
    tests = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
    if any(getattr(pyarrow.types, test)(found) for test in (*tests, "is_fixed_size_binary", "is_null")):
        return
    remedy = "name the field that holds the text with text_column (--text-column)"
    if text_column in chats:
        remedy = f"it is a chat: {chat_remedy(text_column, chats[text_column])}"
    raise ValueError(f"{path}: field {text_column!r}: expected text, found {found}; {remedy}")


def _keys_of_messages(found: Any) -> set[str]:
    """Return the keys of messages where a column holds lists of them."""
    if not (pyarrow.types.is_list(found) or pyarrow.types.is_large_list(found)):
        return set()
    keys = {field.name for field in found.value_type} if pyarrow.types.is_struct(found.value_type) else set()
    return keys if any(each <= keys for each in CHAT_KEYS) else set()


def _values(file: Any, group: int, text_column: str) -> Iterator[bytes | None]:
    """Yield the column's values as bytes, as a string column may hold some that are no UTF-8."""
    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[text_column], use_threads=False):
        column = batch.column(0)
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        yield from column.cast(pyarrow.large_binary()).to_pylist()
