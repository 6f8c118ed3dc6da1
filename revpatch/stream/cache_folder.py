"""The folder of a shard cache: which files are in it, who uses them, and room for more. Safe between processes.

    <sha256>.tar    a whole shard, under the name of its content; who reads it holds a shared lock on it
    <sha256>.part   one that is being fetched, of its full size from the start; who fetches it holds an exclusive lock
    <sha256>.failed why it could not be fetched, for those who waited for it
    .lock           locked while room is made

A lock ends with its process, so that what a killed one leaves behind can be told from what is in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from revpatch.locks import NO_LOCKS


class ShardCacheError(ValueError):
    """The cache's folder can't hold what is asked of it: the budget is too small, or the disk is full or read-only."""


class CacheFolder:
    """At most `max_bytes` of files in `folder`, which is made.

    What others put there is counted, and left alone. Raises ValueError for a budget below one byte and ShardCacheError
    when the folder can't be made.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"{folder}: a shard cache of {max_bytes} bytes holds nothing; raise stream.shard_cache_gb")
        self.folder, self.max_bytes = folder, max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.failed(error) from error

    def open(self, sha256: str) -> int | None:
        """A descriptor of this shard, which is not removed until it is closed; None when the shard is not here."""
        try:
            descriptor = os.open(self._path(sha256), os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.failed(error) from error
        self._lock(descriptor, fcntl.LOCK_SH)  # who has it alone is about to remove it, and won't take long
        if not _is_linked(descriptor):
            os.close(descriptor)
            return None
        os.utime(descriptor)  # the least recently used one is removed first
        return descriptor

    def reserve(self, sha256: str, size: int) -> int | None:
        """A descriptor of a new file of this size, for this process alone to fill and then to `keep` or `abandon`.

        None when another thread or process is at it, or has done it meanwhile. Raises BlockingIOError when there is no
        room while others use what is here, and ShardCacheError when there can't be.
        """
        if size > self.max_bytes:
            raise ShardCacheError(self._budget(size, "the whole budget is less"))
        with self._locked():
            if self._path(sha256).exists():
                return None
            descriptor = os.open(self._part(sha256), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if not _lock_alone(descriptor):
                    os.close(descriptor)
                    return None
                os.ftruncate(descriptor, 0)
                self._make_room(size)
                os.ftruncate(descriptor, size)
            except BaseException as error:
                self.abandon(sha256, descriptor)
                if isinstance(error, OSError) and not isinstance(error, BlockingIOError):
                    raise self.failed(error) from error
                raise
        return descriptor

    def keep(self, sha256: str, descriptor: int) -> None:
        """Make a filled file one of the cache's, still in use. Raises ShardCacheError when the disk fails."""
        try:
            os.fsync(descriptor)
        except OSError as error:  # some file systems find only now that they are full
            raise self.failed(error) from error
        with self._locked():  # a listing might else miss both names, and flock's change of a lock is not atomic
            self._part(sha256).rename(self._path(sha256))
            self._failed(sha256).unlink(missing_ok=True)
            self._lock(descriptor, fcntl.LOCK_SH)

    def abandon(self, sha256: str, descriptor: int) -> None:
        """Remove a reserved file."""
        self._part(sha256).unlink(missing_ok=True)
        os.close(descriptor)

    def note_failure(self, sha256: str, why: str) -> None:
        """Tell those who wait for this shard why it didn't come."""
        with contextlib.suppress(OSError):  # they will find out themselves
            self._failed(sha256).write_text(why, encoding="utf-8")

    def failure_since(self, sha256: str, moment: float) -> str | None:
        """What `note_failure` was told last, if that was after this moment (seconds since the epoch)."""
        path = self._failed(sha256)
        try:
            return path.read_text(encoding="utf-8") if path.stat().st_mtime >= moment else None
        except OSError:
            return None

    def discard(self, sha256: str, descriptor: int) -> None:
        """Remove a damaged shard, unless another process has replaced it meanwhile, and close it."""
        with self._locked():
            path = self._path(sha256)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                path.unlink()
        os.close(descriptor)

    def failed(self, error: OSError) -> ShardCacheError:
        """The error to raise when the disk doesn't do what it is asked."""
        if error.errno in NO_LOCKS:
            return ShardCacheError(
                f"{self.folder}: the shard cache can't be used: its file system has no locks ({error.strerror}), so "
                "nobody would know which shards are in use; set stream.shard_cache to a folder on a local disk"
            )
        return ShardCacheError(
            f"{self.folder}: the shard cache can't be used: {error.strerror or error}; free room on its disk, or set "
            "stream.shard_cache to another folder or stream.shard_cache_gb to less"
        )

    def no_room(self, size: int) -> ShardCacheError:
        """The error to raise when others keep using what is here."""
        return ShardCacheError(self._budget(size, "all that is there is in use"))

    def _make_room(self, size: int) -> None:
        files = []
        for path in self.folder.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:  # its owner has renamed or abandoned it
                continue
            if _is_ours(path, ".part") and self._remove(path):  # its owner is dead
                continue
            files.append((stat.st_mtime_ns, path, stat.st_size))
        excess = sum(file_size for _, _, file_size in files) + size - self.max_bytes
        for _, path, file_size in sorted(files):
            if excess <= 0:
                return
            if _is_ours(path, ".tar") and self._remove(path):
                excess -= file_size
        if excess > 0:
            raise BlockingIOError

    def _remove(self, path: Path) -> bool:
        """Remove a file that nobody has locked; whether it is gone."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            if not _lock_alone(descriptor):
                return False
            path.unlink()
            return True
        finally:
            os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self.failed(error) from error
        try:
            self._lock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int, how: int) -> None:
        try:
            fcntl.flock(descriptor, how)
        except OSError as error:
            raise self.failed(error) from error

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _part(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.part"

    def _failed(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.failed"

    def _budget(self, size: int, why: str) -> str:
        return (
            f"{self.folder}: expected room for a shard of {size} bytes in the cache of {self.max_bytes} bytes, found "
            f"none: {why}; raise stream.shard_cache_gb, or lower stream.shuffle_blocks so that fewer shards are needed "
            "at a time"
        )


def _is_ours(path: Path, ending: str) -> bool:
    return path.suffix == ending and re.fullmatch(r"[0-9a-f]{64}", path.stem) is not None


def _lock_alone(descriptor: int) -> bool:
    """Lock a file that is still in its folder for this descriptor alone; False when it isn't, or is in use."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is_linked(descriptor)


def _is_linked(descriptor: int) -> bool:
    return os.fstat(descriptor).st_nlink > 0
