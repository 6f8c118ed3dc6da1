"""Documents out of files: their endings say how they are read.

    .txt .md                one document a file, or one between separators such as <|endoftext|>
    .jsonl .ndjson          one a line
    .json                   one an object: of an array, alone, or one after another
    .csv .tsv               one a row; the first line names the columns
    .parquet                one a row, of a column of text or of bytes that are text

All but parquet may be compressed. A document that can't be read is a BadDocument where those after it can; every
complaint names the file, the place and what to do. A document must fit the memory, and so must a .json file.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from revpatch.corpus.documents import (
    BUFFER_BYTES,
    CHAT_KEYS,
    COMPRESSIONS,
    BadDocument,
    BrokenCompression,
    ByteCounter,
    Document,
    EmptyCompressed,
    Input,
    Reading,
    chat_remedy,
    check_characters,
    check_text,
    decoded,
    decoded_unchecked,
    decompressed,
    document_of_row,
    excerpt,
    file_identity,
    found_instead,
    missing_column,
    readable,
    refuse_other_formats,
)

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


Documents = Iterator[Document | BadDocument]
_MARK = b"\xef\xbb\xbf"
_JSON_BEGINS = re.compile(rb"(\xef\xbb\xbf)?\s*\[?\s*\{\s*\"")
_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_FIELD = 2**28  # characters of a CSV field; a quote that is never closed takes in all that follows


@dataclass(frozen=True)
class Place:
    """What a file or member is called: `where` in messages, `name` in the ids of its documents."""

    where: str
    name: str


def file_input(path: Path) -> Input:
    """Return the documents of one file, whose ending is known."""
    return Input(str(path), file_identity(path), path.stat().st_size, partial(_read_file, path))


def known_ending(name: str) -> str | None:
    """Return the ending of a file's name that says how it is read, such as ".txt" or ".jsonl.zst", if there is one."""
    lowered = name.lower()
    packed = next((ending for ending in COMPRESSIONS if lowered.endswith(ending)), "")
    kinds = READERS if packed else (*READERS, ".parquet")
    kind = next((ending for ending in kinds if lowered.removesuffix(packed).endswith(ending)), None)
    return None if kind is None else kind + packed


def last_ending(name: str) -> str:
    """Return the ending of a file's name that is unknown, as it is counted."""
    path = PurePath(name.lower())
    inner = PurePath(path.stem).suffix if path.suffix in COMPRESSIONS else ""
    return inner + path.suffix or "without an ending"


def counted(kinds: Counter[str]) -> str:
    """Return how many there are of each kind, the most frequent first."""
    common = kinds.most_common(12)
    rest = kinds.total() - sum(count for _, count in common)
    return ", ".join(f"{count} {kind}" for kind, count in common) + f", {rest} others" * bool(rest)


def read_stream(file: BinaryIO, ending: str, place: Place, reading: Reading) -> Documents:
    """Read a file that is open, forwards. Its ending is known, and not .parquet.

    Raises ValueError where nothing further can be read, and BrokenCompression.
    """
    kind, packed, _ = re.split(r"(\.(?:gz|bz2|xz|zst))$|$", ending, maxsplit=1)
    yield from READERS[kind](decompressed(file, packed) if packed else file, place, reading)


def _read_file(path: Path, reading: Reading) -> Documents:
    ending = known_ending(path.name) or ""
    if ending == ".parquet":
        if not path.stat().st_size:
            yield from _nothing(Place(str(path), path.name), "a parquet file, found no bytes at all", reading)
            return
        yield from read_parquet(path, reading)
        return
    with io.BufferedReader(_Metered(path, reading.meter), BUFFER_BYTES) as file:
        try:
            yield from read_stream(file, ending, Place(str(path), path.name), reading)
        except EmptyCompressed:
            kind = COMPRESSIONS[Path(ending).suffix].name
            yield from _nothing(Place(str(path), path.name), f"a {kind} file, found no bytes at all", reading)
        except BrokenCompression as error:
            name = COMPRESSIONS[Path(ending).suffix].name
            with path.open("rb") as again:
                known = found_instead(again.read(64))
            if known is None or known[0] == name:
                known = (f"one that is broken or cut short ({error})", "copy it again")
            raise ValueError(f"{path}: the {name} file is broken or cut short: found {known[0]}; {known[1]}") from error


def read_text(file: BinaryIO, place: Place, reading: Reading) -> Documents:
    """Yield the file's text or, where it has separators, what stands between them.

    One line end before a separator and one after it belong to neither document. Between two separators with nothing
    but white space there is no document.
    """
    start: bytes = file.peek(1)[:4096]  # type: ignore[attr-defined]
    if _JSON_BEGINS.match(start) and f'"{reading.text_column}":'.encode() in start.replace(b" ", b""):
        if not reading.skip:
            found = f"{place.where}: expected plain text, found JSON with the field {reading.text_column!r}"
            remedy = "give its name the ending .jsonl (an object a line) or .json"
            yield BadDocument(place.name, f"{found}; {remedy}")
        return
    pieces = _between(file, [separator.encode() for separator in reading.separators if separator])
    number = 0
    for piece, is_whole in pieces:
        name, where = (place.name, place.where)
        if not is_whole:
            if not piece.removeprefix(_MARK).strip():
                continue
            number += 1
            name, where = f"{place.name}:{number}", f"{place.where}, document {number}"
        if (not is_whole and number <= reading.skip) or (is_whole and reading.skip):
            continue
        yield readable(name, lambda name=name, piece=piece, where=where: Document(name, decoded(piece, where)))  # type: ignore[misc]


def _between(file: BinaryIO, separators: Sequence[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield the pieces between separators, and whether a piece is the whole file; holds one piece at a time."""
    found_one = False
    held: list[bytes] = []  # of the piece that is not ended, without any separator's beginning
    longest = max(map(len, separators), default=0)
    pattern = re.compile(b"|".join(re.escape(each) for each in sorted(separators, key=len, reverse=True)))
    data = b""
    while True:
        more = file.read(BUFFER_BYTES)
        data += more
        sure = len(data) - longest if more else len(data)  # a longer separator may begin behind it, and not end
        start = 0
        if any(separator in data for separator in separators):
            for match in pattern.finditer(data):
                if match.start() > sure:
                    break
                held.append(data[start : match.start()])
                yield _without_line_ends(b"".join(held), after=found_one, before=True), False
                held, found_one, start = [], True, match.end()
        if not more:
            break
        rest = max(start, sure + 1)
        held.append(data[start:rest])
        data = data[rest:]
    held.append(data[start:])
    yield _without_line_ends(b"".join(held), after=found_one, before=False), not found_one


def _without_line_ends(piece: bytes, *, after: bool, before: bool) -> bytes:
    """Return a piece without the line end that follows the separator before it, or precedes the one after it."""
    if after:
        piece = piece[2:] if piece.startswith(b"\r\n") else piece.removeprefix(b"\n")
    if before:
        piece = piece[:-2] if piece.endswith(b"\r\n") else piece.removesuffix(b"\n")
    return piece


def read_lines(file: BinaryIO, place: Place, reading: Reading) -> Documents:
    """Yield one document a line of JSON."""
    skip = reading.skip
    _refuse_at_once(file, place)
    for number, line in enumerate(file, 1):
        if not line.strip() or (number == 1 and not line.removeprefix(_MARK).strip()):
            continue
        if skip:
            skip -= 1
            continue
        where, name = f"{place.where}:{number}", f"{place.name}:{number}"
        try:
            yield _document_of_line(line, where, name, reading.text_column)
        except ValueError as error:
            yield BadDocument(name, str(error))


def read_json(file: BinaryIO, place: Place, reading: Reading) -> Documents:
    """Yield one document an object: of an array, of a file with one alone, or with several one after another."""
    _refuse_at_once(file, place)
    for number, (text, value, is_single) in enumerate(_json_values(file.read(), place.where), 1):
        if number > reading.skip:
            name = place.name if is_single else f"{place.name}:{number}"
            where = place.where if is_single else f"{place.where}, object {number}"
            yield readable(name, partial(_document_of_value, text, value, where, name, reading.text_column))


def read_csv(file: BinaryIO, place: Place, reading: Reading, delimiters: str = ",;\t|") -> Documents:
    """Yield one document a row. The delimiter is the first of `delimiters` by which the first line names the column.

    A row with a broken quote or another number of fields than the first is a bad one; the next line begins a row.
    """
    _refuse_at_once(file, place)
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    lines = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    head = next(lines, "").removeprefix("\ufeff")
    if not head.strip():
        if not any(line.strip() for line in lines):
            yield from _nothing(place, "a first line that names the columns, found an empty file", reading)
            return
        raise ValueError(f"{place.where}: expected a first line that names the columns, found none; add one")
    splits = {delimiter: next(csv.reader([head], delimiter=delimiter), []) for delimiter in delimiters}
    delimiter = next((each for each in delimiters if reading.text_column in splits[each]), delimiters[0])
    columns = splits[delimiter]
    if reading.text_column not in columns:
        error = missing_column(f"{place.where}: the first line names the columns", reading.text_column, columns)
        raise ValueError(f"{error}, or add a first line with the names where there is none")
    if columns.count(reading.text_column) > 1:
        raise ValueError(
            f"{place.where}: expected one column {reading.text_column!r}, found {columns.count(reading.text_column)}; "
            "rename the others"
        )
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    skip = reading.skip
    while True:
        where = f"{place.where}:{rows.line_num + 2}"
        name = f"{place.name}:{rows.line_num + 2}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            found: Document | BadDocument = BadDocument(
                name,
                f"{where}: expected a row of CSV, found a quote that is not closed or not written twice, up to line "
                f'{rows.line_num + 1} ({error}); write a quote within a quoted field as "", and close each',
            )
        else:
            if row is None:
                return
            if not row:
                continue
            found = readable(name, partial(_document_of_fields, row, columns, where, name, reading.text_column))
        if skip:
            skip -= 1
        else:
            yield found


READERS: dict[str, Callable[[BinaryIO, Place, Reading], Documents]] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiters="\t"),
}
ENDINGS = f"{', '.join(READERS)} (each also with {', '.join(COMPRESSIONS)} after it) or .parquet"


def _nothing(place: Place, found: str, reading: Reading) -> Documents:
    """Yield that a file has nothing in it, as its one bad document: files beside it can be read."""
    if not reading.skip:
        yield BadDocument(place.name, f"{place.where}: expected {found}; copy it again, or delete it")


def _refuse_at_once(file: BinaryIO, place: Place) -> None:
    """Raise ValueError where the file begins as no text does."""
    start: bytes = file.peek(1)[:4096]  # type: ignore[attr-defined]
    refuse_other_formats(start, place.where)


class Repeating(dict[str, Any]):
    """An object that has a key more than once, which JSON allows: `times` says how often each. The last value stays."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.times = Counter(key for key, _ in pairs)


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's keys and values as a dict: the `object_pairs_hook` of whatever reads documents."""
    held = dict(pairs)
    return held if len(held) == len(pairs) else Repeating(pairs)


def _json_values(data: bytes, where: str) -> Iterator[tuple[str, Any, bool]]:
    """Yield JSON values with the text of each, decoded with surrogateescape, and whether it is the only one: the
    elements of an array, or what stands one after another.

    Raises ValueError where the JSON is broken, as nothing says where the next value begins.
    """
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    decoder = json.JSONDecoder(object_pairs_hook=object_of)

    def after_space(place: int) -> int:
        return _SPACE.match(text, place).end()  # type: ignore[union-attr]

    def broken(found: str, place: int) -> ValueError:
        found = found if place < len(text) else "the end of the file"
        return ValueError(
            f"{where}: expected JSON: objects, or an array of them; found {found}, at character {place}; mend the "
            "file, or give it one object a line and the ending .jsonl, so that --on-bad skip can leave a broken one out"
        )

    start = at = after_space(0)
    is_array = text.startswith("[", at)
    if is_array:
        at = after_space(at + 1)
    first = at
    while at < len(text) and not (is_array and text[at] == "]"):
        begin = at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:  # a plain ValueError: a number of too many digits
            found = f"{text[at : at + 20]!r} ({error})"
            if isinstance(error, json.JSONDecodeError) and (
                error.pos >= len(text) or error.msg.startswith("Unterminated string")
            ):
                found = f"the end of the file within {found}"
            raise broken(found, at) from None
        at = after_space(end)
        yield text[begin:end], value, not is_array and begin == first and at == len(text)
        if is_array and text.startswith(",", at):
            at = after_space(at + 1)
        elif is_array and not text.startswith("]", at):
            raise broken(f"{text[at : at + 20]!r} within the array that begins at character {start}", at)
    if is_array and (at == len(text) or after_space(at + 1) < len(text)):
        raise broken("more after the array's end", at)


def _document_of_line(line: bytes, where: str, name: str, text_column: str) -> Document:
    text = decoded_unchecked(line, where)
    try:
        value = json.loads(text, object_pairs_hook=object_of)
    except (ValueError, RecursionError) as error:
        check_characters(line, where)  # of a line that is JSON the text alone counts, and is checked by itself
        spread = text.strip() in ("{", "[", "[{") or text.lstrip().startswith("[")
        remedy = "where its JSON is an array or spread over lines, name the file .json" if spread else "mend the line"
        if "\r" in text.strip():
            remedy = "where its lines end with a carriage return alone: tr '\\r' '\\n' < FILE > NEW.jsonl"
        raise ValueError(f"{where}: expected one JSON object, found {excerpt(text)} ({error}); {remedy}") from None
    return _document_of_object(value, where, name, text_column, text)


def _document_of_object(value: Any, where: str, name: str, text_column: str, text: str) -> Document:
    if not isinstance(value, dict):
        array = "; name the file .json" if isinstance(value, list) else ""
        raise ValueError(
            f"{where}: expected an object with the field {text_column!r}, found {excerpt(text)}; mend it{array}"
        )
    if isinstance(value, Repeating) and value.times[text_column] > 1:
        raise ValueError(
            f"{where}: expected the field {text_column!r} once, found it {value.times[text_column]} times; keep one of "
            "them"
        )
    inner = next(
        (key for key, held in value.items() if isinstance(held, list) and held and isinstance(held[0], dict)), None
    )
    try:
        return document_of_row(value, where, name, text_column)
    except ValueError as error:
        if text_column in value or inner is None or " is a chat" in str(error):
            raise
        raise ValueError(
            f"{error}; or, where {inner!r} holds the documents: jq -c '.[{json.dumps(inner)}][]' FILE > NEW.jsonl"
        ) from None


def _document_of_value(text: str, value: Any, where: str, name: str, text_column: str) -> Document:
    decoded(text.encode("utf-8", "surrogateescape"), where)
    return _document_of_object(value, where, name, text_column, text)


def _document_of_fields(row: list[str], columns: list[str], where: str, name: str, text_column: str) -> Document:
    if len(row) != len(columns):
        raise ValueError(
            f"{where}: expected {len(columns)} fields, as the first line has, found {len(row)}; put quotes around "
            "fields that hold the delimiter"
        )
    fields: dict[str, Any] = dict(zip(columns, row, strict=True))
    fields[text_column] = fields[text_column].encode("utf-8", "surrogateescape")
    return document_of_row(fields, where, name, text_column)


class _Metered(io.FileIO):
    """A file whose position a meter shows."""

    def __init__(self, path: Path, meter: ByteCounter) -> None:
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
