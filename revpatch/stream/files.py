"""Documents out of files: one a .txt file, one a line of .jsonl (either may be .gz or .zst), one a row of .parquet.

A reader per ending, in one table; every complaint names the file, the line, and what to do. A document must fit the
memory.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.parquet

from revpatch.stream.documents import (
    BadDocument,
    Document,
    Input,
    Meter,
    Reading,
    check_text,
    excerpt,
    file_identity,
    missing_column,
)

Documents = Iterator[Document | BadDocument]
_BUFFER_BYTES = 2**18
_PARQUET_ROWS = 128
_PARQUET_BUFFER = 2**20  # without one a whole column of a row group is held, compressed


def file_input(path: Path) -> Input:
    """The documents of one file, whose ending is known."""
    reader = READERS[known_ending(path.name) or ""]
    return Input(str(path), file_identity(path), path.stat().st_size, partial(reader, path))


def known_ending(name: str) -> str | None:
    """The ending of a file's name that says how it is read, if there is one."""
    return next((ending for ending in READERS if name.lower().endswith(ending)), None)


def read_txt(path: Path, reading: Reading) -> Documents:
    if reading.skip:
        return
    with _opened(path, reading.meter) as file:
        yield Document(path.name, decoded(file.read(), str(path)).removeprefix("\ufeff"))


def read_jsonl(path: Path, reading: Reading) -> Documents:
    skip = reading.skip
    with _opened(path, reading.meter) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            text = decoded(line, where).removeprefix("\ufeff" if number == 1 else "")
            if not text.strip():
                continue
            if skip:
                skip -= 1
            else:
                yield json_document(text, where, f"{path.name}:{number}", reading.text_column)


def read_parquet(path: Path, reading: Reading) -> Documents:
    size, skip = path.stat().st_size, reading.skip
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as file:
            if reading.text_column not in file.schema_arrow.names:
                raise missing_column(str(path), reading.text_column, file.schema_arrow.names)
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if rows <= skip:
                    row, skip = row + rows, skip - rows
                    continue
                for value in _parquet_values(file, group, reading.text_column):
                    row += 1
                    if skip:
                        skip -= 1
                        continue
                    text = check_text(value, f"{path}, row {row}", reading.text_column)
                    yield Document(f"{path.name}:{row}", text)
                    reading.meter.bytes = size * row // file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a parquet file, found a broken one ({error}); copy it again") from error


def _parquet_values(file: Any, group: int, text_column: str) -> Iterator[Any]:
    for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[text_column], use_threads=False):
        yield from batch.column(0).to_pylist()


def json_document(text: str, where: str, name: str, text_column: str) -> Document:
    """The document of a JSON object. Raises ValueError where it is none, or has no such text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: expected one JSON object, found {excerpt(text)} ({error}); "
            "mend the line; an object must not be spread over lines"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: expected an object with the field {text_column!r}, found {excerpt(text)}; mend the line"
        )
    if text_column not in value:
        raise missing_column(where, text_column, list(value))
    document = check_text(value[text_column], where, text_column)
    identifier = value.get("id")
    return Document(identifier if isinstance(identifier, str) else name, document)


def decoded(data: bytes, where: str) -> str:
    """The bytes as text. Raises ValueError where they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: expected UTF-8, found the byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it, for example: iconv -f latin1 -t utf-8"
        ) from None


@contextlib.contextmanager
def _opened(path: Path, meter: Meter) -> Iterator[BinaryIO]:
    """The file, decompressed as its ending says. Raises ValueError where a compressed file is broken or cut."""
    with io.BufferedReader(_Metered(path, meter), _BUFFER_BYTES) as file:
        try:
            if path.name.lower().endswith(".gz"):
                yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
            elif path.name.lower().endswith(".zst"):
                yield io.BufferedReader(_Zstd(file), _BUFFER_BYTES)
            else:
                yield file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: the gzip file is broken or cut short ({error}); copy it again") from error
        except _BrokenZstd as error:
            raise ValueError(f"{path}: the zstd file is broken or cut short ({error}); copy it again") from error


class _Metered(io.FileIO):
    """A file whose position a meter shows."""

    def __init__(self, path: Path, meter: Meter) -> None:
        super().__init__(path, "rb")
        self._meter = meter

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self._meter.bytes = self.tell()
        return count

    def readall(self) -> bytes:  # what a buffered reader calls for the rest of a file
        data = super().readall()
        self._meter.bytes = self.tell()
        return data


class _BrokenZstd(Exception):
    """What pyarrow found wrong."""


class _Zstd(io.RawIOBase):
    """Decompresses; of one frame or several."""

    def __init__(self, file: BinaryIO) -> None:
        self._stream = pyarrow.CompressedInputStream(file, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:
            raise _BrokenZstd(str(error)) from error
        buffer[: len(data)] = data
        return len(data)


READERS: dict[str, Callable[[Path, Reading], Documents]] = {
    ".txt": read_txt,
    ".txt.gz": read_txt,
    ".txt.zst": read_txt,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".parquet": read_parquet,
}
