"""A shard and where it lies: what is expected of it, and the error that says how it differs."""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import dataclass

from revpatch.stream.manifest import Shard
from revpatch.stream.tars import HEADER_BYTES, ShardError, member_name, stride_of

_HASH_CHUNK = 2**20
_ADVICE = "copy this file again from where it came, or build the shards again into a new folder"


@dataclass(frozen=True)
class PlacedShard:
    """Shard `index` of the `count` in a set, whose manifest has the digest `digest`: `location` is its path or URL,
    `first_block` the id it begins with."""

    location: str
    index: int
    count: int
    shard: Shard
    first_block: int
    block_bytes: int
    digest: str = ""

    def error(self, expected: str, found: str, offset: int | None = None, advice: str = _ADVICE) -> ShardError:
        """The error to raise; it names the shard's location and number."""
        message = f"{self.location}: shard {self.index} of {self.count}: expected {expected}, found {found}; {advice}"
        return ShardError(message, self.location, self.index, offset, self.digest)

    def verify(self, descriptor: int) -> None:
        """Hash an open copy of the shard. Raises ShardError when it is not what the manifest says."""
        sha256, size = hashlib.sha256(), 0
        try:
            while chunk := os.pread(descriptor, _HASH_CHUNK, size):
                sha256.update(chunk)
                size += len(chunk)
        except OSError as error:
            raise self.error("a file that can be read", str(error), size) from error
        self.check(descriptor, size, sha256.hexdigest())

    def check(self, descriptor: int, size: int, sha256: str) -> None:
        """Compare the size and hash of an open copy, whose first `size` bytes count. Raises ShardError."""
        self.check_size(descriptor, size)
        if sha256 == self.shard.sha256:
            return
        offset, where = self._damage(descriptor, size)
        raise self.error(f"sha256 {self.shard.sha256}", f"{sha256} ({where})", offset)

    def check_size(self, descriptor: int, size: int) -> None:
        """Compare the size of an open copy. Raises ShardError, with the offset where the damage shows."""
        if size != self.shard.bytes:
            offset, where = self._damage(descriptor, size)
            raise self.error(f"{self.shard.bytes} bytes", f"{size} ({where})", offset)

    def _damage(self, descriptor: int, size: int) -> tuple[int | None, str]:
        """The offset at which the damage shows first, or None, and a description."""
        stride = stride_of(self.block_bytes)
        for offset in range(0, self.shard.blocks * stride, stride):
            name = member_name(self.first_block + offset // stride)
            if size < offset + stride:
                return offset, f"it ends at byte {size}, before the end of member {name} at offset {offset}"
            try:
                header = tarfile.TarInfo.frombuf(os.pread(descriptor, HEADER_BYTES, offset), "utf-8", "replace")
            except tarfile.HeaderError as error:
                return offset, f"no header of member {name} at offset {offset}: {error}"
            if header.name != name or header.size != self.block_bytes:
                return offset, f"member {header.name!r} instead of {name} at offset {offset}"
        if size != self.shard.bytes:
            offset = min(size, self.shard.bytes)
            return offset, f"its members are sound, and it differs from offset {offset} on"
        return None, "its members' headers are sound, so the data of blocks differ"
