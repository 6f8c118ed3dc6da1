"""Compressed files, decompressed as they are read: gzip, bzip2, xz and zstd.

Each format is a row of `COMPRESSIONS`. A file may be several streams of it one after another, as pigz, pbzip2 and
`cat` leave them; each has to end, and nothing else may follow, so that a file that is cut or damaged is never taken
for a shorter one.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
        """Bytes for the stream that is open or, where none is, for the next one; b"" at the end of the last."""
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
