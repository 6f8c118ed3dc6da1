"""`wds:URL`: documents out of tars of raw text, one a .txt member, one a .json member.

The URL is a path, or anything that remote.py opens: http(s), `pipe:COMMAND`, what else fsspec knows. A tar that is
compressed with gzip is known by its first bytes. Python's tarfile takes a tar that is cut or overwritten for one that
ends there, so what follows the last member is looked at: zeros up to the end, and at least one block of them.
"""

from __future__ import annotations

import gzip
import io
import logging
import tarfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import braceexpand

from revpatch.stream import remote
from revpatch.stream.documents import BadDocument, Document, Input, Meter, Reading, file_identity
from revpatch.stream.files import decoded, json_document

_log = logging.getLogger(__name__)
RETRIES = 5
_CHUNK = 2**16
_GZIP = b"\x1f\x8b"


def tar_inputs(spec: str) -> list[Input]:
    """One input for each tar. Raises FileNotFoundError for a path that isn't there, ValueError for broken braces."""
    url = spec.removeprefix("wds:")
    try:
        is_there = not remote.is_remote(url) and Path(url).exists()  # a command may be longer than any path
        urls = [url] if is_there else list(braceexpand.braceexpand(url))
    except ValueError as error:
        raise ValueError(f"{spec}: the braces are not balanced ({error}); write a range as {{000..009}}") from None
    return [_tar_input(url) for url in urls]


def _tar_input(url: str) -> Input:
    if remote.is_remote(url):
        return Input(f"wds:{url}", {"url": url}, None, partial(_read, url))
    path = Path(url)
    if not path.is_file():
        raise FileNotFoundError(f"wds:{url}: no such file; check the path, which is relative to {Path.cwd()}")
    return Input(f"wds:{url}", file_identity(path), path.stat().st_size, partial(_read, url))


def _read(url: str, reading: Reading) -> Iterator[Document | BadDocument]:
    others: Counter[str] = Counter()
    matched = False
    try:
        with _Download(url) if remote.is_remote(url) else io.FileIO(url) as raw:
            stream = _Watched(raw, reading.meter)
            with tarfile.open(fileobj=cast(Any, stream), mode="r|") as tar:
                skip = reading.skip
                for member in tar:
                    cast(Any, tar).members = []  # tarfile keeps all it has seen, which nobody asks for again
                    name = member.name.lower()
                    if not member.isfile():
                        continue
                    if not name.endswith((".txt", ".json")):
                        others[name.rpartition("/")[2].partition(".")[2] or "no ending"] += 1
                        continue
                    matched = True
                    if skip:
                        skip -= 1
                        continue
                    yield from _documents_of_member(url, member, cast(IO[bytes], tar.extractfile(member)), reading)
                end = tar.offset
            stream.check_end(end)
    except (tarfile.TarError, _BadTar, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"wds:{url}: the tar is broken or cut short ({error}); copy it again") from error
    left_out = ", ".join(f"{count} .{ending}" for ending, count in others.most_common(5))
    if others and not matched:
        raise ValueError(f"wds:{url}: expected members that end in .txt or .json, found {left_out}; name other tars")
    if others:
        _log.warning("wds:%s: members that are neither .txt nor .json are left out: %s", url, left_out)


def _documents_of_member(
    url: str, member: tarfile.TarInfo, file: IO[bytes], reading: Reading
) -> Iterator[Document | BadDocument]:
    where, name = f"wds:{url}, member {member.name}", member.name
    data = file.read()
    if len(data) != member.size:
        raise _BadTar(f"member {member.name} has {len(data)} bytes of {member.size}")
    text = decoded(data, where).removeprefix("\ufeff")
    if member.name.lower().endswith(".json"):
        yield json_document(text, where, name, reading.text_column)
    else:
        yield Document(name, text)


class _BadTar(Exception):
    """What is wrong with the tar's bytes."""


class _Download(io.RawIOBase):
    """A remote tar, read from its beginning; `tell` counts the bytes. After a failure it is opened again, and what came
    before is read over if it is the same.

    Reading raises FileNotFoundError and ConnectionError for what the host or the command didn't give, and ValueError
    as `remote.stream` does.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._chunks: Generator[bytes, None, None] | None = None
        self._received, self._crc32 = 0, 0
        self._rest = memoryview(b"")
        self._taken = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._taken

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(self._next())
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        self._taken += count
        return count

    def close(self) -> None:
        self._let_go()
        super().close()

    def _next(self) -> bytes:
        try:
            chunk = remote.with_retries(self._url, self._attempt, RETRIES)
        except ValueError:  # says it all, such as a package that is missing
            raise
        except Exception as error:  # each implementation of fsspec raises errors of its own
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ConnectionError
            found = f"{remote.describe(error)}, after {self._taken} bytes"
            raise kind(f"wds:{self._url}: expected a tar, found {found}; check the URL or the command") from error
        self._received, self._crc32 = self._received + len(chunk), zlib.crc32(chunk, self._crc32)
        return chunk

    def _attempt(self) -> bytes:
        try:
            if self._chunks is not None:
                return next(self._chunks, b"")
            self._chunks = remote.stream(self._url)
            return self._read_over(self._chunks)
        except BaseException:
            self._let_go()
            raise

    def _read_over(self, chunks: Iterator[bytes]) -> bytes:
        """What comes after all that was received before; b"" at the end."""
        left, crc32 = self._received, 0
        while left:
            chunk = next(chunks, b"")
            if not chunk:
                raise ConnectionError(f"it ended {left} bytes before the place to go on from")
            before, after = chunk[:left], chunk[left:]
            left, crc32 = left - len(before), zlib.crc32(before, crc32)
            if not left and crc32 != self._crc32:
                raise ValueError(
                    f"wds:{self._url}: the connection broke, and opened again it gave other bytes than before; "
                    "it must stay as it is while it is read"
                )
            if after:
                return after
        return next(chunks, b"")

    def _let_go(self) -> None:
        if self._chunks is not None:
            self._chunks.close()
            self._chunks = None


class _Watched:
    """What tarfile's stream mode asks of a file, `read` alone; knows where the last byte that is no zero was."""

    def __init__(self, raw: io.RawIOBase, meter: Meter) -> None:
        self._raw = raw
        buffered = io.BufferedReader(raw, _CHUNK)
        compressed = buffered.peek(len(_GZIP)).startswith(_GZIP)
        self._file = cast(BinaryIO, gzip.GzipFile(fileobj=buffered)) if compressed else buffered
        self._meter = meter
        self._read = 0
        self._last_byte = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        written = len(data.rstrip(b"\0"))
        if written:
            self._last_byte = self._read + written
        self._read += len(data)
        self._meter.bytes = self._raw.tell()
        return data

    def check_end(self, end: int) -> None:
        """Read what is left; raises _BadTar unless the tar ends at `end` as it should."""
        while self.read(_CHUNK):
            pass
        if self._last_byte > end:
            raise _BadTar(f"at byte {end} expected a header or the end, found neither")
        if self._read < end + tarfile.BLOCKSIZE:
            raise _BadTar(f"expected the end's zeros at byte {end}, found {max(0, self._read - end)} bytes")
