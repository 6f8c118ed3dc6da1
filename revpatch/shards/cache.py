"""Shards as open files, hashed when they are opened; copies of remote ones in a folder on the local disk.

    <sha256>.tar    a whole shard, under the name of its content
    <sha256>.part   one that is being fetched, of its full size from the start, locked by who fetches it
    .lock           locked while room is made

A lock ends with its process, so that what a killed one leaves behind is told from what is being fetched. A copy that is
removed while it is open stays readable: what is open may lie beyond the budget.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from revpatch.config import StreamConfig
from revpatch.durable import NO_LOCKS
from revpatch.shards import remote
from revpatch.shards.format import Shard, ShardError, ShardFault

OPEN_FILES = 16
_CHANGED = "copy this file again from where it came, or build the shards again into a new folder"


@dataclass(frozen=True)
class PlacedShard:
    """Shard `index` of the `count` in the set whose manifest has the digest `digest`; `location` is its path or URL,
    `first_block` the id of its first block in the set."""

    location: str
    index: int
    count: int
    shard: Shard
    first_block: int
    digest: str

    def error(self, expected: str, found: str, advice: str = _CHANGED) -> ShardError:
        """Return the error to raise; it names the shard's location and number."""
        message = f"{self.location}: shard {self.index} of {self.count}: expected {expected}, found {found}; {advice}"
        return ShardError(message, ShardFault(self.digest, self.index, self.location, message))

    def verify(self, descriptor: int) -> None:
        """Hash an open copy of the shard. Raises ShardError when it is not what the manifest says."""
        try:
            self.check_size(os.fstat(descriptor).st_size)
            with open(descriptor, "rb", closefd=False) as file:
                file.seek(0)
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self.error("a file that can be read", str(error)) from error
        self.check_sha256(sha256)

    def check_size(self, size: int) -> None:
        """Raise ShardError for another size than the manifest's, in bytes."""
        if size != self.shard.bytes:
            raise self.error(f"{self.shard.bytes} bytes", str(size))

    def check_sha256(self, sha256: str) -> None:
        """Raise ShardError for another sha256 (hex) than the manifest's."""
        if sha256 != self.shard.sha256:
            raise self.error(f"sha256 {self.shard.sha256}", sha256)


Stamp = tuple[int, int, int]


def stamp_of(descriptor: int) -> Stamp:
    """Return what differs when a file is another one, or was changed: inode, bytes, time of change in ns."""
    stat = os.fstat(descriptor)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class OpenShard:
    """A file that is open until nobody holds this object any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class OpenShards:
    """At most 16 open shards, the most recently used ones. Safe for threads; a later use opens again what was closed.

    Args:
        open_: returns a descriptor of a shard; raises ShardError where it can't.
    """

    def __init__(self, open_: Callable[[PlacedShard], int]) -> None:
        self._open = open_
        self._lock = threading.Lock()
        self._files: OrderedDict[str, OpenShard] = OrderedDict()  # by location, least recently used first
        self._verified: dict[str, Stamp] = {}

    def get(self, placed: PlacedShard) -> OpenShard:
        """Return the shard, verified. Raises ShardError when it is broken, and what `open_` does."""
        with self._lock:
            file = self._files.pop(placed.location, None)
        if file is None or self._verified.get(placed.location) != stamp_of(file.descriptor):
            file = OpenShard(self._open(placed))
            self.verify(placed, file.descriptor)
        with self._lock:
            self._files[placed.location] = file
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def verify(self, placed: PlacedShard, descriptor: int) -> None:
        """Hash a file, unless it is known as it is now. Raises ShardError when it is not what the manifest says."""
        stamp = stamp_of(descriptor)
        if self._verified.get(placed.location) != stamp:
            placed.verify(descriptor)
            self._verified[placed.location] = stamp

    def has(self, placed: PlacedShard) -> bool:
        """Return whether the shard is open."""
        return placed.location in self._files

    def know(self, placed: PlacedShard, descriptor: int) -> None:
        """Take a file for verified as it is now, as its bytes were hashed while they were written."""
        self._verified[placed.location] = stamp_of(descriptor)

    def close(self) -> None:
        """Close all files that nobody reads at this moment."""
        with self._lock:
            self._files.clear()


_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_WANTED = 256
_WRONG_CONTENTS = 2
_ADVICE = "look whether the host can be reached and the file is there; if it is gone, copy it there again"


class ShardCacheError(ValueError):
    """The cache's folder can't hold what is asked of it: the budget is too small, or the disk is full or read-only."""


class ShardCache:
    """Local copies of shards, at most `max_bytes` of them in `folder`, which all processes of a machine may share.

    A shard is fetched by one of them while the others wait; where its attempts fail, each of these makes one more. The
    least recently used copy makes room, and what others put into the folder is counted and left alone. A copy is
    hashed once by each process. Safe for threads; close it, or use it as a context.

    Raises ValueError (ShardCacheError is one) for a budget of nothing or a folder that can't be made.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder).absolute(), max_bytes
        if max_bytes < 1:
            raise ValueError(f"{folder}: a shard cache of {max_bytes} bytes holds nothing; raise stream.shard_cache_gb")
        with self._disk():
            self.folder.mkdir(parents=True, exist_ok=True)
        self._files = OpenShards(self._open)
        self._lock = threading.Lock()
        self._fetched: set[str] = set()
        self._wanted: set[str] = set()
        self._queue: queue.SimpleQueue[PlacedShard | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ShardCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files, and let the thread end with the fetch it is in. A later use opens again."""
        with self._lock:
            if self._thread is not None:
                self._queue.put(None)
            self._queue, self._thread = queue.SimpleQueue(), None
            self._wanted.clear()
        self._files.close()

    def get(self, placed: PlacedShard) -> OpenShard:
        """Return a verified copy of the shard, fetched if need be.

        Raises ShardError when the shard can't be had or is broken, ShardCacheError when there is no room for it, and
        ValueError when its URL needs a package that is not installed.
        """
        return self._files.get(placed)

    def want(self, shards: Iterable[PlacedShard]) -> None:
        """Fetch these in the background. An error is kept quiet: who reads the shard meets it then."""
        with self._lock:
            for placed in shards:
                if placed.location in self._wanted or self._files.has(placed):
                    continue
                if len(self._wanted) >= _WANTED:  # it is a wish, not an order
                    break
                self._wanted.add(placed.location)
                self._queue.put(placed)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, args=(self._queue,), name="revpatch-shard-cache", daemon=True
                )
                self._thread.start()

    def _run(self, wanted: queue.SimpleQueue[PlacedShard | None]) -> None:
        while (placed := wanted.get()) is not None and wanted is self._queue:
            try:
                os.close(self._open(placed))
            except ShardError:  # stays among the wanted: it is not fetched again before someone reads it
                continue
            except Exception as error:
                _log.debug("%s: not fetched ahead: %s", placed.location, error)
            with self._lock:
                self._wanted.discard(placed.location)

    def _open(self, placed: PlacedShard) -> int:
        """Return a descriptor of a verified copy, whoever fetches it."""
        waited = False
        while True:
            with self._disk(), contextlib.suppress(FileNotFoundError):
                descriptor = os.open(self._path(placed, ".tar"), os.O_RDONLY | os.O_CLOEXEC)
                if self._is_sound(placed, descriptor):
                    # The least recently used copy goes first. The time of change stays, as it tells a changed file.
                    with contextlib.suppress(PermissionError):  # another person's copy, in a folder that is shared
                        os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
                    return descriptor
            waited = self._fetch(placed, 0 if waited else remote.RETRIES)

    def _is_sound(self, placed: PlacedShard, descriptor: int) -> bool:
        """Return whether a copy is what it should be. One that isn't is removed, unless it is replaced, and closed."""
        try:
            self._files.verify(placed, descriptor)
            return True
        except ShardError as error:
            _log.warning("%s: the cached copy is damaged, and is fetched again: %s", self.folder, error)
            with self._locked():
                if self._is_at(self._path(placed, ".tar"), descriptor):
                    self._path(placed, ".tar").unlink()
            os.close(descriptor)
            return False

    def _fetch(self, placed: PlacedShard, retries: int) -> bool:
        """Fetch the shard, unless another thread or process does: then wait for its end, and return True."""
        part, path = self._path(placed, ".part"), self._path(placed, ".tar")
        with self._disk():
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    return True
                if not self._is_at(part, descriptor):  # who had it has just ended
                    return False
                try:
                    if path.exists():
                        part.unlink()
                    else:
                        self._fill(placed, descriptor, retries)
                        with self._locked():  # a listing might else miss both names
                            part.rename(path)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
            finally:
                os.close(descriptor)
        return False

    def _fill(self, placed: PlacedShard, descriptor: int, retries: int) -> None:
        """Make room for the shard and download it into a file."""
        if placed.shard.bytes > self.max_bytes:
            raise self._no_room(placed, "the whole budget is less")
        os.ftruncate(descriptor, 0)
        while not self._make_room(placed, descriptor):
            time.sleep(_POLL_SECONDS)  # what others are fetching takes it all
        self._download(placed, descriptor, retries)
        os.fsync(descriptor)  # some file systems find only now that they are full
        if placed.location in self._fetched:
            _log.warning(
                "%s was fetched a second time: a cache of %d bytes does not hold the shards that are read in turn; "
                "raise stream.shard_cache_gb, or lower stream.shuffle_blocks (a remote replay.base must fit it whole)",
                placed.location,
                self.max_bytes,
            )
        self._fetched.add(placed.location)
        self._files.know(placed, descriptor)

    def _download(self, placed: PlacedShard, descriptor: int, retries: int) -> None:
        """Fill the file. Raises ShardError when no attempt brings the shard."""
        wrong = received = 0

        def attempt() -> None:
            nonlocal received
            sha256, received = hashlib.sha256(), 0
            with open(descriptor, "wb", buffering=0, closefd=False) as file:
                file.seek(0)
                for chunk in remote.stream(placed.location):
                    received += len(chunk)
                    if received > placed.shard.bytes:
                        raise placed.error(f"{placed.shard.bytes} bytes", "more")
                    with self._disk():
                        remote.write_all(file, chunk)
                    sha256.update(chunk)
            placed.check_size(received)
            placed.check_sha256(sha256.hexdigest())

        def final(error: Exception) -> bool:
            nonlocal wrong
            if not isinstance(error, ShardError):
                return remote.is_final(error)
            wrong += received >= placed.shard.bytes  # less may be a connection that broke, unnoticed
            return wrong == _WRONG_CONTENTS

        try:
            remote.with_retries(placed.location, attempt, retries, final)
        except ValueError:  # says it all: a broken shard, a full disk, a package that is missing
            raise
        except Exception as error:
            found = f"{remote.describe(error)}, after {received} bytes"
            raise placed.error(f"{placed.shard.bytes} bytes", found, _ADVICE) from error

    def _make_room(self, placed: PlacedShard, descriptor: int) -> bool:
        """Give the file its size, for which the least recently used copies go. False while too much is being fetched.

        Raises ShardCacheError when what else lies there leaves no room.
        """
        size, copies, fetching, foreign = placed.shard.bytes, [], 0, 0
        with self._locked():
            for path in self.folder.iterdir():
                try:
                    stat = path.stat()
                    if re.fullmatch(r"[0-9a-f]{64}\.tar", path.name):
                        copies.append((stat.st_atime_ns, path, stat.st_size))
                    elif not re.fullmatch(r"[0-9a-f]{64}\.part", path.name):
                        foreign += stat.st_size
                    elif not _remove_if_left(path):
                        fetching += stat.st_size
                except FileNotFoundError:  # it was given up meanwhile
                    continue
            if foreign + size > self.max_bytes:
                raise self._no_room(placed, "other files take it")
            if foreign + fetching + size > self.max_bytes:
                return False
            excess = foreign + fetching + size + sum(each for *_, each in copies) - self.max_bytes
            for _, path, each in sorted(copies):
                if excess > 0:
                    path.unlink()
                    excess -= each
            os.ftruncate(descriptor, size)
        return True

    def _no_room(self, placed: PlacedShard, why: str) -> ShardCacheError:
        return ShardCacheError(
            f"{self.folder}: expected room for a shard of {placed.shard.bytes} bytes in the cache of {self.max_bytes} "
            f"bytes, found none: {why}; raise stream.shard_cache_gb, or name another folder in stream.shard_cache"
        )

    def _path(self, placed: PlacedShard, ending: str) -> Path:
        return self.folder / f"{placed.shard.sha256}{ending}"

    @staticmethod
    def _is_at(path: Path, descriptor: int) -> bool:
        try:
            return os.path.samestat(path.stat(), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Say of a disk that doesn't do what it is asked what can be done about it."""
        try:
            yield
        except OSError as error:
            remedy = (
                "free room on its disk, or set stream.shard_cache to another folder or stream.shard_cache_gb to less"
            )
            if error.errno in NO_LOCKS:
                remedy = "its file system has no locks; set stream.shard_cache to a folder on a local disk"
            raise ShardCacheError(
                f"{self.folder}: the shard cache can't be used: {error.strerror or error}; {remedy}"
            ) from error


def _remove_if_left(part: Path) -> bool:
    """Remove a file that nobody is filling; return whether it is gone."""
    with part.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        part.unlink()
        return True


def cache_for(stream: StreamConfig, places: list[str]) -> ShardCache | None:
    """Return where the shards of those places that are not local are kept, if there are any."""
    if stream.shard_cache is None or not any(remote.is_remote(place) for place in places):
        return None
    return ShardCache(Path(stream.shard_cache).expanduser(), int(stream.shard_cache_gb * 1e9))
