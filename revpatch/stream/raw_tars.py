"""`wds:URL`: documents out of tars of raw text, one a .txt member, one a .json member.

The URL is a path, http(s), or `pipe:COMMAND`, opened as webdataset opens it. Python's tarfile takes a tar that is cut
or overwritten for one that ends there, so what follows the last member is looked at: zeros up to the end, and at least
one block of them.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import braceexpand

from revpatch.stream import long_text
from revpatch.stream.documents import Document, Input, LongDocument, Meter, Reading, file_identity
from revpatch.stream.files import decoded, json_document, scanned_documents, spooled_document

_log = logging.getLogger(__name__)
_CHUNK = 2**16


def tar_inputs(spec: str) -> list[Input]:
    """One input for each tar. Raises FileNotFoundError for a path that isn't there, ValueError for broken braces."""
    url = spec.removeprefix("wds:")
    try:
        urls = [url] if Path(url).exists() else list(braceexpand.braceexpand(url))
    except ValueError as error:
        raise ValueError(f"{spec}: the braces are not balanced ({error}); write a range as {{000..009}}") from None
    return [_tar_input(url) for url in urls]


def _tar_input(url: str) -> Input:
    if url.startswith(("pipe:", "http:", "https:")) or "://" in url:
        return Input(f"wds:{url}", {"url": url}, None, partial(_read, url))
    path = Path(url)
    if not path.is_file():
        raise FileNotFoundError(f"wds:{url}: no such file; check the path, which is relative to {Path.cwd()}")
    return Input(f"wds:{url}", file_identity(path), path.stat().st_size, partial(_read, url))


def _read(url: str, reading: Reading) -> Iterator[Document | LongDocument]:
    others: Counter[str] = Counter()
    matched = False
    try:
        with _opened(url) as raw:
            stream = _Watched(raw, reading.meter, compressed=url.lower().endswith((".gz", ".tgz")))
            with tarfile.open(fileobj=cast(Any, stream), mode="r|") as tar:
                skip = reading.skip
                for member in tar:
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


@contextlib.contextmanager
def _opened(url: str) -> Iterator[BinaryIO]:
    """The tar's bytes. Raises _BadTar when the command or the download that gave them all ended with a failure."""
    from webdataset.gopen import gopen  # which imports torch, and takes seconds: only where it is needed

    raw = cast(BinaryIO, io.FileIO(url) if Path(url).is_file() else gopen(url, "rb"))
    try:
        yield raw
    except BaseException:
        with contextlib.suppress(OSError):  # a command whose output nobody wants any more fails, as it should
            raw.close()
        raise
    try:
        raw.close()
    except OSError as error:
        raise _BadTar(f"the command that gives it failed: {error}") from error


def _documents_of_member(
    url: str, member: tarfile.TarInfo, file: IO[bytes], reading: Reading
) -> Iterator[Document | LongDocument]:
    where, name = f"wds:{url}, member {member.name}", member.name
    if member.size <= long_text.LONG_BYTES:
        data = file.read()
        if len(data) != member.size:
            raise _BadTar(f"member {member.name} has {len(data)} bytes of {member.size}")
        text = decoded(data, where).removeprefix("\ufeff")
        if member.name.lower().endswith(".json"):
            yield json_document(text, where, name, reading.text_column)
        else:
            yield Document(name, text)
    elif member.name.lower().endswith(".json"):
        yield from scanned_documents(file.read, where, name, reading, first=True)
    else:
        path = reading.spool / "long_text"
        with path.open("wb") as spool:
            data = file.read(_CHUNK).removeprefix(b"\xef\xbb\xbf")
            while data:
                spool.write(data)
                data = file.read(_CHUNK)
            size = spool.tell()
        yield spooled_document(path, size, name, where)
        path.unlink()


class _BadTar(Exception):
    """What is wrong with the tar's bytes."""


class _Watched:
    """What tarfile's stream mode asks of a file, `read` alone; knows where the last byte that is no zero was."""

    def __init__(self, raw: BinaryIO, meter: Meter, *, compressed: bool) -> None:
        self._raw = raw
        self._file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if compressed else raw
        self._meter = meter
        self._read = 0
        self._last_byte = 0

    def read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            if error.errno is None:  # webdataset's word for a command that failed
                raise _BadTar(f"the command that gives it failed: {error}") from error
            raise
        written = len(data.rstrip(b"\0"))
        if written:
            self._last_byte = self._read + written
        self._read += len(data)
        self._meter.bytes = self._read if self._file is self._raw else self._raw.tell()
        return data

    def check_end(self, end: int) -> None:
        """Read what is left; raises _BadTar unless the tar ends at `end` as it should."""
        while self.read(_CHUNK):
            pass
        if self._last_byte > end:
            raise _BadTar(f"at byte {end} expected a header or the end, found neither")
        if self._read < end + tarfile.BLOCKSIZE:
            raise _BadTar(f"expected the end's zeros at byte {end}, found {max(0, self._read - end)} bytes")
