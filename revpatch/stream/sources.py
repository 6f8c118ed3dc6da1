"""Documents out of files: one a .txt file, one a line of .jsonl (.gz).

Files are read in the order given and lines in file order, so that the same sources give the same documents.
A reader per ending, in one table; every complaint names the file, the line, and what to do.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class Document:
    """A text and a name for it: the line's "id" where it has one, else 'file' or 'file:line'."""

    id: str
    text: str


def read_documents(sources: Iterable[str | Path], text_column: str = "text") -> Iterator[Document]:
    """The documents of all sources, in order.

    All paths are checked before the first document is read. Raises FileNotFoundError for a missing file and
    ValueError for an unknown ending, a folder, text that is not UTF-8, broken JSON, or a line whose `text_column`
    is missing or no text.
    """
    checked = [_check(Path(source)) for source in sources]
    return (document for path, read in checked for document in read(path, text_column))


def _check(path: Path) -> tuple[Path, Reader]:
    endings = [ending for ending in _READERS if path.name.lower().endswith(ending)]
    if path.is_dir():
        raise ValueError(f"{path}: expected a file, found a folder; name the files in it, for example {path}/*.txt")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path, which is relative to {Path.cwd()}")
    if not endings:
        raise ValueError(
            f"{path}: expected a file ending in {', '.join(_READERS)}, found {path.suffix or 'no ending'!r}; "
            'rename it, or write its documents as JSONL, one {"text": ...} a line'
        )
    return path, _READERS[endings[0]]


def _read_txt(path: Path, text_column: str) -> Iterator[Document]:
    yield Document(path.name, _decode(path.read_bytes(), str(path)).removeprefix("\ufeff"))


def _read_jsonl(path: Path, text_column: str) -> Iterator[Document]:
    with path.open("rb") as file:
        yield from _documents_of_lines(file, path, text_column)


def _read_jsonl_gz(path: Path, text_column: str) -> Iterator[Document]:
    try:
        with gzip.open(path, "rb") as file:
            yield from _documents_of_lines(file, path, text_column)  # type: ignore[arg-type]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the gzip file is broken or cut short ({error}); copy it again") from error


def _documents_of_lines(file: BinaryIO, path: Path, text_column: str) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        where = f"{path}:{number}"
        text = _decode(line, where).removeprefix("\ufeff" if number == 1 else "")
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"{where}: expected one JSON object, found {_excerpt(text)} ({error}); "
                "mend the line; an object must not be spread over lines"
            ) from None
        if not isinstance(value, dict):
            raise ValueError(
                f"{where}: expected an object with the field {text_column!r}, found {_excerpt(text)}; mend the line"
            )
        if text_column not in value:
            raise ValueError(
                f"{where}: expected the field {text_column!r}, found {', '.join(map(repr, value)) or 'no field'}; "
                "name the field that holds the text with text_column (--text-column)"
            )
        document = value[text_column]
        if not isinstance(document, str):
            raise ValueError(
                f"{where}: field {text_column!r}: expected text, found {type(document).__name__} "
                f"{_excerpt(json.dumps(document))}; name the field that holds the text with text_column (--text-column)"
            )
        _check_unicode(document, where, text_column)
        identifier = value.get("id")
        yield Document(identifier if isinstance(identifier, str) else f"{path.name}:{number}", document)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: expected UTF-8, found the byte 0x{data[error.start]:02x} at offset {error.start}; convert it, "
            "for example: iconv -f latin1 -t utf-8"
        ) from None


def _check_unicode(text: str, where: str, text_column: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        raise ValueError(
            f"{where}: field {text_column!r}: expected characters, found half of a surrogate pair "
            f"(\\u{ord(text[error.start]):04x}) at character {error.start}; take it out of the line"
        ) from None


def _excerpt(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


Reader = Callable[[Path, str], Iterator[Document]]
_READERS: dict[str, Reader] = {".txt": _read_txt, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl_gz}
