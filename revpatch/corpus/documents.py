"""Documents, and the bytes that they are made of: decompressed, and UTF-8 or refused in one line that says why.

No encoding is guessed and used: what is found is named, and the person converts it. Text that is UTF-8 and yet junk (a
NUL, many control characters, the leavings of a wrong conversion) is refused too, as a model would learn it. A
compressed file may be several streams one after another, as pigz and `cat` leave them; each has to end, and nothing may
follow.
"""

from __future__ import annotations

import bz2
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

BUFFER_BYTES = 2**18
_CHUNK = 2**14  # compressed; a thousand times as many may come out of it
_ZSTD_WINDOW = 2**31  # the most that the format has: `zstd --long=31`


class BrokenCompression(Exception):
    """Says what is wrong with compressed bytes."""


class EmptyCompressed(BrokenCompression):
    """There are none, not even those of a compressed file with nothing in it."""


@dataclass(frozen=True)
class Compression:
    """A format: its name, its first bytes (all that they may be), and what decompresses one stream of it (`decompress`,
    `eof`, `unused_data`).

    `padding` are bytes that may stand between streams and after the last one.
    """

    name: str
    magic: bytes | tuple[bytes, ...]
    decompressor: Callable[[], Any]
    padding: bytes = b""


def _zstd() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()


COMPRESSIONS = {
    ".gz": Compression("gzip", b"\x1f\x8b", partial(zlib.decompressobj, wbits=31), b"\0"),
    ".bz2": Compression("bzip2", tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)), bz2.BZ2Decompressor),
    ".xz": Compression("xz", b"\xfd7zXZ\0", lzma.LZMADecompressor, b"\0"),
    ".zst": Compression("zstd", b"\x28\xb5\x2f\xfd", _zstd),
}
"""By the ending that such a file's name has."""


def ending_by_content(start: bytes) -> str | None:
    """Return the ending in `COMPRESSIONS` of the format that begins with these bytes."""
    return next((ending for ending, each in COMPRESSIONS.items() if start.startswith(each.magic)), None)


def decompressed(file: BinaryIO, ending: str) -> BinaryIO:
    """Return what is in a compressed file, as a file that is read forwards.

    Reading it raises BrokenCompression where the bytes are not of this format, are damaged, or end too soon.
    """
    return io.BufferedReader(cast(Any, _Decompressing(file, COMPRESSIONS[ending])), BUFFER_BYTES)


class _Decompressing(io.RawIOBase):
    def __init__(self, file: BinaryIO, compression: Compression) -> None:
        self._file, self._compression = file, compression
        self._stream: Any = None
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            data = self._next_compressed()
            if not data:
                return 0
            try:
                self._rest = memoryview(self._stream.decompress(data))
            except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError) as error:
                raise BrokenCompression(str(error)) from error
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def _next_compressed(self) -> bytes:
        """Return bytes for the stream that is open or, where none is, for the next one; b"" at the end of the last."""
        if self._stream is not None and not self._stream.eof:
            data = self._file.read(_CHUNK)
            if not data:
                raise BrokenCompression("it ends within a stream")
            return data
        first = self._stream is None
        data = b"" if first else self._stream.unused_data.lstrip(self._compression.padding)
        while not data:
            read = self._file.read(_CHUNK)
            if not read:
                if first:
                    raise EmptyCompressed("it is empty")
                return b""
            data = read if first else read.lstrip(self._compression.padding)
        self._stream = self._compression.decompressor()
        return data


_CONTROLS = bytes({*range(9), *range(14, 27), *range(28, 32), 127})  # not tab, line ends, form feed, escape (colours)
_FEW, _SHARE = 2, 0.02  # so many junk characters, and so large a share of the bytes, may be there
_SAMPLE = 2**16
_SHOWN = 24

_MAGIC: tuple[tuple[bytes | tuple[bytes, ...], str, str], ...] = (  # so long that no text begins so by chance
    (b"version https://git-lfs.github.com/spec/v1", "a git-LFS pointer", "fetch the file itself: git lfs pull"),
    (b"%PDF-", "a PDF", "make text of it, for example: pdftotext FILE FILE.txt"),
    (b"{\\rtf", "rich text (RTF)", "make text of it, for example: pandoc FILE -t plain -o FILE.txt"),
    (b"PK\x03\x04", "a zip file (.zip, .docx, .xlsx, .epub)", "unpack it (unzip FILE), or export it as text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file (.doc, .xls)", "export it as text"),
    (b"\x00\x05\x16\x07", "macOS's data about another file (AppleDouble), no text", "delete it"),
    *((packed.magic, packed.name, f"give its name the ending {ending}") for ending, packed in COMPRESSIONS.items()),
    (b"PAR1\x15", "parquet", "give its name the ending .parquet"),
    (b"ARROW1\0\0", "an Arrow file", "name its folder with hf:FOLDER:SPLIT"),
    (b"\x89PNG", "a PNG picture", "leave it out"),
    (b"\xff\xd8\xff", "a JPEG picture", "leave it out"),
    (b"SQLite format 3\0", "an SQLite database", "export its text as CSV or JSONL"),
    (b"\x7fELF", "a program", "leave it out"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z file", "unpack it: 7z x FILE"),
    (b"Rar!\x1a\x07", "a rar file", "unpack it: unrar x FILE"),
)
_MARKS = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
# The high bytes of UTF-16: of alphabets, and of Chinese, Japanese and Korean text with its signs and spaces.
_HIGH_OF_ALPHABETS = bytes(range(0x20))
_SIGNS = bytes((0x00, 0x20, 0x30, 0xFF))
_HIGH_OF_CJK = bytes({*_SIGNS, 0x31, *range(0x4E, 0xA0), *range(0xAC, 0xD8)})
_LATIN_SIGNS = "€…‘’“”•–—™\xa0£§©«®°»·½¡¿"


def decoded(data: bytes, where: str) -> str:
    """Return the bytes as text, without a byte order mark.

    Raises ValueError where they are not UTF-8, or are no text: see `check_characters`.
    """
    text = decoded_unchecked(data, where)
    check_characters(data, where)
    return text


def decoded_unchecked(data: bytes, where: str) -> str:
    """Return the bytes as text, without a byte order mark. Raises ValueError where they are not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(data, error.start, where)) from None


def check_characters(data: bytes, where: str) -> None:
    """Raise ValueError where UTF-8 is no text: a NUL, many control characters, a format that is known.

    Args:
        data: the text in UTF-8.
        where: the file and the place in it.
    """
    controls = len(data) - len(data.translate(None, _CONTROLS))
    replaced = data.count(b"\xef\xbf\xbd")
    if _is_much(controls, data) or b"\0" in data:
        if wide := _wide_text(data):
            found, remedy = wide
        elif known := found_instead(data):
            found, remedy = known
        elif (nuls := data.count(0)) <= controls / 2 and _is_much(controls, data):
            found = f"{controls} control characters among {len(data)} bytes: it is binary"
            remedy = "leave it out, or make text of it with the program that wrote it"
        else:
            found = f"{nuls} NUL{'s' * (nuls > 1)} among {len(data)} bytes, the first at {_place(data, data.find(0))}"
            remedy = (
                "copy it again where a copy was cut off, or take them out: tr -d '\\000' < FILE > NEW (in JSON they "
                "are written \\u0000: sed 's/\\\\u0000//g' FILE > NEW)"
            )
        raise ValueError(f"{where}: expected text, found {found}; {remedy}")
    if _is_much(replaced, data):
        raise ValueError(
            f"{where}: expected text, found {replaced} replacement characters (U+FFFD) among {len(data)} bytes, which "
            "a wrong conversion leaves; convert the file that it was made from again, from its right encoding"
        )
    if b"\xc2" in data and _is_much(len(re.findall(rb"\xc2[\x80-\x84\x86-\x9f]", data)), data):
        raise ValueError(
            f"{where}: expected text, found control characters (U+0080 to U+009F), which come of cp1252 that is "
            f"converted as latin1; convert the file that it was made from: {_iconv('cp1252')}"
        )
    if data.startswith(_NAMED_BEFOREHAND) and (known := found_instead(data)):
        raise ValueError(f"{where}: expected text, found {known[0]}; {known[1]}")


def found_instead(start: bytes) -> tuple[str, str] | None:
    """Return the format that begins with these bytes and what to do about it, where it is one that is no text."""
    return next(((found, remedy) for magic, found, remedy in _MAGIC if start.startswith(magic)), None)


def refuse_other_formats(start: bytes, where: str) -> None:
    """Raise ValueError where a file of lines or rows begins as no text does, so that no line of it can be read."""
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), None)
    known = found_instead(start) or ((encoding.upper(), f"convert it: {_iconv(encoding)}") if encoding else None)
    if known is None and _is_much(len(start) - len(start.translate(None, _CONTROLS)), start):
        known = _wide_text(start)
    if known is not None:
        raise ValueError(f"{where}: expected text, found {known[0]}; {known[1]}")


_NAMED_BEFOREHAND = (b"version https://git-lfs", b"%PDF-", b"{\\rtf", b"PAR1\x15")  # those that may be all UTF-8


def _wide_text(data: bytes) -> tuple[str, str] | None:
    """Return the name of UTF-16 or UTF-32 that is UTF-8 as well, and what to do."""
    if data.startswith((b"\xc3\xbf\xc3\xbe", b"\xc3\xbe\xc3\xbf")):  # its mark
        return "UTF-16 that was converted as latin1", f"convert the file that it was made from: {_iconv('utf-16')}"
    encoding = _wide_encoding_of(data)
    return None if encoding is None else (f"{encoding} without a mark", f"convert it: {_iconv(encoding)}")


def _place(data: bytes, offset: int) -> str:
    """Return where a byte lies, as a person looks for it."""
    line = data.count(b"\n", 0, offset) + 1
    return f"offset {offset}" + f" (line {line})" * (line > 1)


def _is_much(count: int, data: bytes) -> bool:
    return count > _FEW and count > _SHARE * len(data)


def _iconv(encoding: str) -> str:
    return f"iconv -f {encoding} -t utf-8 FILE > NEW"


def _not_utf8(data: bytes, offset: int, where: str) -> str:
    found = f"{where}: expected UTF-8, found the byte 0x{data[offset]:02x} at {_place(data, offset)}"
    for mark, name in _MARKS:
        if data.startswith(mark):
            return f"{found}: it is {name.upper()}; convert it: {_iconv(name)}"
    if known := found_instead(data):
        return f"{found}: it is {known[0]}; {known[1]}"
    text = data.decode("utf-8", "surrogateescape")
    broken = sum(map(_is_broken, text))
    whole = sum(character > "\x7f" for character in text) - broken
    leave_out = "iconv -c -f utf-8 -t utf-8 FILE > NEW leaves such bytes out, --on-bad skip such documents"
    if whole > 4 * broken:
        return f"{found}, among {whole} characters that are: {broken} bytes are broken; copy it again, or {leave_out}"
    if encoding := _wide_encoding_of(data) or _wide_encoding_of(data, _HIGH_OF_CJK):
        return f"{found}: it is {encoding} without a mark; convert it: {_iconv(encoding)}"
    if _is_much(len(data) - len(data.translate(None, _CONTROLS)), data):
        return f"{found}, and control characters: it is binary; leave it out, or make text of it with what wrote it"
    first = data[max(0, offset - _SHOWN) : offset + _SHOWN]
    if _reads_as_latin(text):
        shown = " ".join(first.decode("cp1252", "replace").split())
        return (
            f"{found}; where {shown!r} is what it should say there, convert it: {_iconv('cp1252')}; where not, "
            f"{leave_out}"
        )
    if whole >= broken or broken <= _FEW:
        return f"{found}: {broken} bytes are broken, {whole} characters are not; copy it again, or {leave_out}"
    return (
        f"{found}, and {broken} such bytes in all; where it is in another encoding (cp1251, koi8-r, gb18030, "
        f"shift_jis, euc-kr, ...) find its name (uchardet FILE) and convert it: iconv -f NAME -t utf-8 FILE > NEW; "
        f"where its bytes are broken, {leave_out}"
    )


def _is_broken(character: str) -> bool:
    return "\udc80" <= character <= "\udcff"


def _reads_as_latin(text: str) -> bool:
    """Return whether bytes that are no UTF-8 stand as accented letters and signs of cp1252 do: few among plain letters,
    and next to one. `text` is decoded with surrogateescape."""
    try:
        read = text.encode("utf-8", "surrogateescape").decode("cp1252")
    except UnicodeDecodeError:
        return False
    if any(character > "\x7f" and not _is_broken(character) for character in text):
        return False
    letters = [
        i for i, character in enumerate(read) if character > "\x7f" and character.isalpha() and character not in "þÿ"
    ]
    signs = sum(read.count(sign) for sign in _LATIN_SIGNS)
    plain = sum(character.isascii() and character.isalpha() for character in read)
    others = sum(character > "\x7f" for character in read) - len(letters) - signs
    beside = sum(1 for i in letters if any(c.isascii() and c.isalpha() for c in read[max(0, i - 1) : i + 2]))
    return others == 0 and plain > 2 * len(letters) and beside >= 0.8 * len(letters)


def _wide_encoding_of(data: bytes, highs: bytes = _HIGH_OF_ALPHABETS) -> str | None:
    """Return "utf-16le", "utf-16be", "utf-32le" or "utf-32be" where the bytes look like it: the `highs` alone stand in
    the place of the high bytes, and other bytes in that of the low ones."""
    sample = data[: min(len(data), _SAMPLE) // 4 * 4]
    least = 8 if highs == _HIGH_OF_ALPHABETS else 64  # in less, both places can look so by chance
    if len(sample) < least or sample.count(0) > 0.9 * len(sample):
        return None
    for name, highest, high in (("utf-32le", sample[3::4], sample[2::4]), ("utf-32be", sample[::4], sample[1::4])):
        if not any(highest) and max(high) <= 0x10:
            return name
    for name, high, low in (("utf-16le", sample[1::2], sample[::2]), ("utf-16be", sample[::2], sample[1::2])):
        if _share(high, highs) > 0.95 and _share(low, highs) < 0.8 and _share(high, _SIGNS) > 0.02:
            return name
    return None


def _share(data: bytes, of: Iterable[int]) -> float:
    return 1 - len(data.translate(None, bytes(of))) / len(data)


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
class ByteCounter:
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
    meter: ByteCounter = field(default_factory=ByteCounter)


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
        raise ValueError(f"{place}: expected text, found NoneType (null); leave such rows out, or give --on-bad skip")
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
