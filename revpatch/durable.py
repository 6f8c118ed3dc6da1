"""Files and folders that survive a crash: written beside their place, synced, renamed; and the sha256 of files."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_CHUNK = 1 << 20
_LOCK_NAME = ".lock"
TEMPORARY_SUFFIX = ".tmp"


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
    """Where `new_folder` writes what is to become `folder`: `.NAME.unfinished` beside it."""
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
    lock = _locked(temporary / _LOCK_NAME, named)
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


def _locked(path: Path, named: str) -> IO[Any]:
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it may have finished between the opening and the locking: the file is then no longer there.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
    except BlockingIOError:
        pass
    file.close()
    raise FileExistsError(f"{named}: another process is writing there: wait for it, or name another folder")


def _sync_tree(folder: Path) -> None:
    """Makes all files and names in `folder` durable."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            with (Path(place) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(place))


def sync_directory(directory: Path) -> None:
    """Makes renames, new names and removals in `directory` durable. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(data: bytes) -> str:
    """The sha256 of `data`, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """The sha256 of the file at `path`, read in pieces of 1 MiB. Raises OSError."""
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
