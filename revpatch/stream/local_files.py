"""The shards of a local folder, used where they lie: opened when asked for and hashed before their first use,
and again when another file has taken the place of one since."""

from __future__ import annotations

import os
from collections import OrderedDict

from revpatch.stream.placed_shard import PlacedShard

_OPEN_FILES = 64

_Stamp = tuple[int, int, int]


class LocalFiles:
    """Open files of one set. For one thread at a time."""

    def __init__(self) -> None:
        self._verified: dict[int, _Stamp] = {}
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recently used first

    def acquire(self, placed: PlacedShard) -> int:
        """A descriptor of the shard, good until it is released. Raises ShardError when the shard is broken."""
        if placed.index not in self._files:
            self._files[placed.index] = self._open(placed)
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(placed.index)
        return self._files[placed.index]

    def release(self, placed: PlacedShard) -> None:
        """Done with what `acquire` gave; it stays open for the next time."""

    def close(self) -> None:
        """Close all files. A later use opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, placed: PlacedShard) -> int:
        try:
            descriptor = os.open(placed.location, os.O_RDONLY)
        except FileNotFoundError as error:
            raise placed.error("a file", "nothing") from error
        except OSError as error:
            raise placed.error("a file that can be read", str(error)) from error
        try:
            stamp = _stamp_of(descriptor)
            if self._verified.get(placed.index) != stamp:
                placed.verify(descriptor)
                self._verified[placed.index] = stamp
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _stamp_of(descriptor: int) -> _Stamp:
    """What differs when the file is another one, or was changed."""
    stat = os.fstat(descriptor)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
