"""`wds:URL`: documents out of tars of raw text, whose members are read as files of their endings are.

The URL is a path, or anything that remote.py opens: http(s), `pipe:COMMAND`, what else fsspec knows; that is downloaded
whole to a temporary file, anew if the connection breaks. A tar that is compressed is known by its first bytes. Python's
tarfile takes a tar that is cut or overwritten for one that ends there, so all is read up to the last byte: there must
be headers or zeros, and zeros at the end. Several tars one after another are read as one.
"""

from __future__ import annotations

import io
import logging
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import braceexpand

from revpatch.corpus.documents import (
    BadDocument,
    BrokenCompression,
    ByteCounter,
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
_CHUNK = 2**16
_LINKS = "links"
# Errors of tarfile that its type stubs leave out.
_EOF, _EMPTY, _SUBSEQUENT = (getattr(tarfile, f"{name}HeaderError") for name in ("EOF", "Empty", "Subsequent"))


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
    read = 0
    try:
        with _opened(url) as raw:
            stream = _Unpacked(raw, reading.meter)
            with _Tar.open(fileobj=cast(Any, stream), mode="r|", tarinfo=_Member, ignore_zeros=True) as tar:
                for member in tar:
                    cast(Any, tar).members = []  # tarfile keeps all it has seen, which nobody asks for again
                    name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                    if member.isdir():
                        continue
                    if (reason := _why_left_out(member)) is not None:
                        left_out[reason] += 1
                        continue
                    read += 1
                    place = Place(f"wds:{url}, member {name}", name)
                    with io.BufferedReader(_Forwards(tar.extractfile(member)), _CHUNK) as file:
                        yield from _documents_of(file, place, reading)
                if tar.tars > 1:
                    _log.warning("wds:%s: %d tars one after another; all are read", url, tar.tars)
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


class _Tar(tarfile.TarFile):
    """Tars one after another: how many there were, where this one starts, and blocks of zeros since its last member."""

    tars = 1
    start = 0
    zeros = 0


class _Member(tarfile.TarInfo):
    """A header, of which tarfile with `ignore_zeros` passes over what is none; here that is an error.

    Only zeros up to the end of a record (20 blocks), as tar writes them, may stand between two headers.
    """

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        zeros, at = tar.zeros, tar.fileobj.tell()
        tar.zeros = 0  # the next header may be read within this call
        try:
            member = super().fromtarfile(tar)
        except _EOF:
            tar.zeros = zeros + 1
            raise
        except _EMPTY:  # the end of the file
            if not at:
                raise _BadTar("it is empty") from None
            if not zeros:
                raise _BadTar(
                    f"it ends at byte {at}, after a member and without the zeros of a tar's end",
                    "copy it again; or, where it is whole and was written so, add the end to the tar (decompressed): "
                    "head -c 1024 /dev/zero >> TAR",
                ) from None
            raise
        except _SUBSEQUENT:  # which tarfile itself refuses
            raise
        except tarfile.HeaderError:
            raise _BadTar(f"at byte {at} expected a header or the end, found neither") from None
        if zeros:
            if zeros < 2 or (at - tar.start) % tarfile.RECORDSIZE:
                raise _BadTar(
                    f"at byte {at} expected the end, found a header after {zeros} blocks of zeros",
                    "copy it again; or, where several tars were put into one file, unpack them all (mkdir FOLDER; "
                    "tar -xif TAR -C FOLDER) and name the folder",
                )
            tar.start, tar.tars = at, tar.tars + 1
        return member


@contextmanager
def _opened(url: str) -> Iterator[io.RawIOBase]:
    """Open a tar; a remote one is downloaded first, to a file without a name in the folder for temporary files.

    Raises FileNotFoundError and ConnectionError for what the host or the command didn't give, and ValueError for a
    full disk and as `remote.stream` does.
    """
    if not remote.is_remote(url):
        with io.FileIO(url) as local:
            yield local
        return
    with tempfile.TemporaryFile(buffering=0) as file:
        raw = cast(io.RawIOBase, file)

        def attempt() -> None:
            raw.seek(0)
            raw.truncate()
            for chunk in remote.stream(url):
                try:
                    remote.write_all(raw, chunk)
                except OSError as error:
                    raise ValueError(
                        f"wds:{url}: expected room for the tar in {tempfile.gettempdir()}, found {error.strerror} "
                        f"after {raw.tell()} bytes; name a folder on a larger disk in TMPDIR"
                    ) from error

        try:
            remote.with_retries(url, attempt, remote.RETRIES)
        except ValueError:  # says it all, such as a package that is missing
            raise
        except Exception as error:  # each implementation of fsspec raises errors of its own
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ConnectionError
            found = f"{remote.describe(error)}, after {raw.tell()} bytes"
            raise kind(f"wds:{url}: expected a tar, found {found}; check the URL or the command") from error
        raw.seek(0)
        yield raw


class _Forwards(io.RawIOBase):
    """Gives a member's file as one that can't seek; tarfile's stream can't say so itself."""

    def __init__(self, member: Any) -> None:
        self._member = member

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._member.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Unpacked:
    """Gives what tarfile's stream mode asks of a file, `read` alone: the tar's bytes, decompressed."""

    def __init__(self, raw: io.RawIOBase, meter: ByteCounter) -> None:
        self._raw, self._meter = raw, meter
        buffered = io.BufferedReader(raw, _CHUNK)
        start = buffered.peek(512)
        ending = ending_by_content(start)
        if ending is None and (known := found_instead(start)):
            raise _BadTar(f"it is {known[0]}, no tar", known[1])
        self._file = decompressed(buffered, ending) if ending is not None else cast(BinaryIO, buffered)

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except BrokenCompression as error:
            raise _BadTar(str(error)) from error
        finally:
            self._meter.bytes = self._raw.tell()
