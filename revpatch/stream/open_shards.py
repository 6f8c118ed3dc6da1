"""Shards as open files: each is hashed against the manifest when it is opened, and again when its file has changed."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from revpatch.stream.manifest import Shard
from revpatch.stream.tars import ShardError, ShardFault

OPEN_FILES = 16
_ADVICE = "copy this file again from where it came, or build the shards again into a new folder"


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

    def error(self, expected: str, found: str, advice: str = _ADVICE) -> ShardError:
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
