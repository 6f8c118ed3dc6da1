"""Files that survive a crash: written beside their place, synced, renamed; locks, sha256 and canonical JSON.

A lock ends with the process that holds it. Lustre mounted without `flock`, NFS without its lock service and some CIFS
refuse to lock a file: there a file among this machine's temporary ones stands in, and a warning says that other
machines are not kept out. The same value gives the same JSON (sorted keys, no spaces, ASCII), so that it can be hashed;
a float that is not finite becomes "NaN", "Infinity" or "-Infinity", which Python's `float()` turns back.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel

_CHUNK = 1 << 20
_LOCK_NAME = ".lock"
TEMPORARY_SUFFIX = ".tmp"
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS)
"""What a file system answers that syncs files alone."""


def write_atomically(path: Path, data: bytes) -> None:
    """Puts `data` at `path`: after a crash or an error the old file (or none) is there, or the whole new one.

    Raises OSError (a full disk, a missing folder) with `path` in it; the temporary file is then removed.
    """
    # A random name: after a restart in a container the process has the same id as the one that was killed.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"could not write {len(data)} bytes ({error.strerror})", str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def unfinished(folder: Path) -> Path:
    """Return where `new_folder` writes what is to become `folder`: `.NAME.unfinished` beside it."""
    return folder.with_name(f".{folder.name}.unfinished")


@contextmanager
def new_folder(folder: Path, named: str) -> Iterator[Path]:
    """A folder beside `folder` that becomes it when all is written and on the disk, and goes if something fails.

    It is locked, so what a process that was killed has left there is known to be nobody's, and is written anew.

    Args:
        folder: not there yet; its parents are made.
        named: what a person called it, for messages.

    Raises:
        FileExistsError: another process is writing it.
        OSError: the disk fails, or something has taken the name meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(folder)
    temporary.mkdir(exist_ok=True)
    if (lock := lock_file(temporary / _LOCK_NAME)) is None:
        raise FileExistsError(f"{named}: another process is writing there: wait for it, or name another folder")
    try:
        for left in temporary.iterdir():
            if left.name != _LOCK_NAME:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield temporary
        _sync_tree(temporary)
        (temporary / _LOCK_NAME).unlink()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        lock.close()
    sync_directory(folder.parent)


def _sync_tree(folder: Path) -> None:
    """Makes all files and names in `folder` durable."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            with (Path(place) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(place))


def sync_directory(directory: Path) -> None:
    """Makes renames, new names and removals in `directory` durable, as far as its file system can do that: some of
    NFS, CIFS, Lustre and FUSE refuse to sync a folder, and write names through by themselves. Raises OSError."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise OSError(error.errno, f"the folder could not be synced ({error.strerror})", str(directory)) from error


def sha256_of(data: bytes) -> str:
    """Return the sha256 of `data`, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of the file at `path`, read in pieces of 1 MiB. Raises OSError."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is what git leaves in the place of a large file that `git lfs pull` has not fetched yet."""
    with path.open("rb") as file:
        return file.read(42).startswith(b"version https://git-lfs.github.com/spec/v1")


log = logging.getLogger("revpatch")

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""What a file system without locks answers."""


def lock_file(path: Path) -> IO[Any] | None:
    """Locks a file, which is made if it is missing, for this process alone until the returned file is closed.

    None if another process holds it, or has held it and removed it meanwhile. Raises OSError if it can't be opened.
    """
    file: IO[Any] = path.open("a")
    try:
        held = _try(file)
    except OSError as error:
        file.close()
        if error.errno not in NO_LOCKS:
            raise
        file = _stand_in(path, error)
        held = _try(file)
    there = path.exists() and (file.name != str(path) or os.path.samestat(path.stat(), os.fstat(file.fileno())))
    if held and there:
        return file
    file.close()
    return None


def _try(file: IO[Any]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stand_in(path: Path, error: OSError) -> IO[Any]:
    """Return the file on this machine that is locked in place of one whose file system has no locks."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    place = Path(tempfile.gettempdir()) / f"revpatch-{name}.lock"
    log.warning(
        "%s: its file system has no locks (%s; Lustre: mount it with -o flock, NFS: start its lock service). %s stands "
        "in, which keeps out other processes of this machine alone: start nothing on another machine that writes there",
        path.parent,
        error.strerror,
        place,
    )
    try:
        return place.open("rb")  # another user's, perhaps: a lock needs no right to write
    except FileNotFoundError:
        return place.open("ab")


def to_plain(value: Any, where: str = "value") -> Any:
    """Returns `value` as None, bool, int, float, str, list and dict with str keys; tuples become lists, and a model a
    dict of the fields that it was given.

    Raises ValueError with the path below `where` of the first thing that has no place in JSON (a tensor, a Path, a
    numpy number, a key that is not a str).
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, list | tuple):
        return [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r} of type {type(key).__name__}: keys must be str")
        return {key: to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, BaseModel):
        return to_plain(value.model_dump(exclude_unset=True, warnings=False), where)
    raise ValueError(
        f"{where} is a {type(value).__name__}: only None, bool, int, float, str, list and dict can be recorded. "
        "Convert it first (a tensor or numpy number with .item() or .tolist(), a path with str())."
    )


def canonical_json(value: Any, where: str = "value") -> str:
    """Return the one JSON spelling of `value`, on one line. Raises ValueError as `to_plain` does."""
    return json.dumps(to_plain(value, where), sort_keys=True, separators=(",", ":"), allow_nan=False)


def size(count: int) -> str:
    """Return bytes, as people read them."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"


def printable(text: str) -> str:
    """Return the text with "?" in place of escape and other control characters, which would steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
