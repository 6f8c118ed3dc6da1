"""`wds:URL`: documents out of tars of raw text, whose members are read as files of their endings are.

The URL is a path, or anything that remote.py opens: http(s), `pipe:COMMAND`, what else fsspec knows. What is remote, or
compressed as its first bytes say, is first written whole to a temporary file. Python's tarfile takes a tar that is cut
or overwritten for one that ends there, so the end that it finds is checked: zeros up to the file's last byte, or before
another tar, which is read as well.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import braceexpand

from revpatch.corpus.documents import (
    BadDocument,
    BrokenCompression,
    Document,
    Input,
    Reading,
    decompressed,
    ending_by_content,
    file_identity,
    found_instead,
)
from revpatch.corpus.readers import READERS, Place, counted, known_ending, last_ending, read_stream
from revpatch.shards import remote

_log = logging.getLogger(__name__)
_CHUNK = 2**20
_LINKS = "links"


def tar_inputs(spec: str) -> list[Input]:
    """Return one input for each tar.

    Raises FileNotFoundError for a path that isn't there, ValueError for broken braces.
    """
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
    every = Reading(reading.text_column, 0, reading.separators, reading.meter)
    yield from islice(_read_all(url, every), reading.skip, None)


def _read_all(url: str, reading: Reading) -> Iterator[Document | BadDocument]:
    left_out: Counter[str] = Counter()
    read = tars = 0
    start: int | None = 0
    try:
        with _opened(url) as (file, size):
            whole = file.seek(0, os.SEEK_END) or 1
            while start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        cast(Any, tar).members = []  # tarfile keeps all it has seen, which nobody asks for again
                        reading.meter.bytes = size * min(tar.offset, whole) // whole
                        name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                        if member.isdir():
                            continue
                        if (reason := _why_left_out(member)) is not None:
                            left_out[reason] += 1
                            continue
                        read += 1
                        content = cast(BinaryIO, tar.extractfile(member))
                        yield from _documents_of(content, Place(f"wds:{url}, member {name}", name), reading)
                start, tars = _next_tar(file, start, tar.offset), tars + 1
            reading.meter.bytes = size
            if tars > 1:
                _log.warning("wds:%s: %d tars one after another; all are read", url, tars)
    except (tarfile.TarError, _BadTar) as error:
        remedy = error.remedy if isinstance(error, _BadTar) else "copy it again"
        raise ValueError(f"wds:{url}: the tar is broken or cut short ({error}); {remedy}") from error
    finally:
        if left_out and read:
            _log.warning("wds:%s: members that are no text are left out: %s", url, _said(left_out))
    if left_out and not read:
        raise ValueError(
            f"wds:{url}: expected members that end in {', '.join(READERS)}, found {_said(left_out)}; name other tars"
        )


def _documents_of(file: BinaryIO, place: Place, reading: Reading) -> Iterator[Document | BadDocument]:
    """Yield a member's documents. One that can't be read on is a bad document, as the next member can."""
    try:
        yield from read_stream(file, known_ending(place.name) or "", place, reading)
    except (ValueError, BrokenCompression) as error:
        broken = f"{place.where}: broken or cut short ({error}); pack it again"
        yield BadDocument(place.name, broken if isinstance(error, BrokenCompression) else str(error))


def _why_left_out(member: tarfile.TarInfo) -> str | None:
    path = PurePosixPath(member.name)
    if path.name.startswith("._") or "__MACOSX" in path.parts:
        return "of macOS's own (._NAME, __MACOSX)"
    if member.issym() or member.islnk():
        return _LINKS
    if not member.isfile():
        return "devices or pipes"
    ending = known_ending(path.name)
    return last_ending(path.name) if ending in (None, ".parquet") else None


def _said(left_out: Counter[str]) -> str:
    hint = (
        " (what a link points to is read where it is such a member itself; to have it under both names, pack with tar "
        "--dereference --hard-dereference)"
    )
    return counted(left_out) + hint * (_LINKS in left_out)


class _BadTar(Exception):
    """Says what is wrong with the tar's bytes, and what to do."""

    def __init__(self, found: str, remedy: str = "copy it again") -> None:
        super().__init__(found)
        self.remedy = remedy


def _next_tar(file: BinaryIO, start: int, end: int) -> int | None:
    """Check a tar's end, which begins at `end`. Return where another tar begins behind it, or None.

    Only zeros up to the end of a record (20 blocks), as tar writes them, may stand between two tars.
    """
    file.seek(end)
    block, zeros = file.read(tarfile.BLOCKSIZE), 0
    while block and not any(block):
        block, zeros = file.read(tarfile.BLOCKSIZE), zeros + 1
    if not zeros and not block:
        raise _BadTar(
            f"it ends at byte {end}, after a member and without the zeros of a tar's end",
            "copy it again; or, where it is whole and was written so, add the end to the tar (decompressed): "
            "head -c 1024 /dev/zero >> TAR",
        )
    if not block:
        return None
    at = end + zeros * tarfile.BLOCKSIZE
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise _BadTar(f"at byte {at} expected a header or the end, found neither") from None
    if zeros < 2 or (at - start) % tarfile.RECORDSIZE:
        raise _BadTar(
            f"at byte {at} expected the end, found a header after {zeros} blocks of zeros",
            "copy it again; or, where several tars were put into one file, unpack them all (mkdir FOLDER; "
            "tar -xif TAR -C FOLDER) and name the folder",
        )
    return at


@contextmanager
def _opened(url: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a tar as a local file that is not compressed, and return its bytes as they were packed.

    What is remote or compressed is first written to a file without a name in the folder for temporary files. Raises
    FileNotFoundError and ConnectionError for what the host or the command didn't give, and ValueError for a full disk
    and as `remote.stream` does.
    """
    with ExitStack() as opened:
        file: BinaryIO
        if remote.is_remote(url):
            file = cast(BinaryIO, opened.enter_context(tempfile.TemporaryFile(buffering=0)))
            _download(url, file)
        else:
            file = opened.enter_context(Path(url).open("rb"))
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(512)
        file.seek(0)
        if not start:
            raise _BadTar("it is empty")
        ending = ending_by_content(start)
        if ending is None and (known := found_instead(start)):
            raise _BadTar(f"it is {known[0]}, no tar", known[1])
        if ending is not None:
            packed, file = file, cast(BinaryIO, opened.enter_context(tempfile.TemporaryFile(buffering=0)))
            try:
                for chunk in iter(partial(decompressed(packed, ending).read, _CHUNK), b""):
                    _write(url, file, chunk)
            except BrokenCompression as error:
                raise _BadTar(str(error)) from error
        yield file, size


def _download(url: str, file: BinaryIO) -> None:
    def attempt() -> None:
        file.seek(0)
        file.truncate()
        for chunk in remote.stream(url):
            _write(url, file, chunk)

    try:
        remote.with_retries(url, attempt, remote.RETRIES)
    except ValueError:  # says it all, such as a package that is missing
        raise
    except Exception as error:  # each implementation of fsspec raises errors of its own
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ConnectionError
        found = f"{remote.describe(error)}, after {file.tell()} bytes"
        raise kind(f"wds:{url}: expected a tar, found {found}; check the URL or the command") from error


def _write(url: str, file: BinaryIO, chunk: bytes) -> None:
    before = file.tell()
    try:
        remote.write_all(cast(io.RawIOBase, file), chunk)
    except OSError as error:
        raise ValueError(
            f"wds:{url}: expected room for the tar in {tempfile.gettempdir()}, found {error.strerror} after {before} "
            "bytes; name a folder on a larger disk in TMPDIR"
        ) from error
