"""Files and folders that survive a crash: written beside their place, synced, renamed; and the sha256 of files."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from revpatch.locks import lock_file

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
