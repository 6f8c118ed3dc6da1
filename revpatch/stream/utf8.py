"""Bytes to text: UTF-8, or one line that says what the bytes are instead and what makes text of them.

No encoding is guessed and used: what is found is named, and the person converts it. Text that is UTF-8 and yet junk
(a NUL, many control characters, the leavings of a wrong conversion) is refused as well, as a model would learn it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from revpatch.stream.compression import COMPRESSIONS

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
