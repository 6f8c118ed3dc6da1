"""A shard and where it lies: what is expected of it, and the error that says how it differs."""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from revpatch.stream import remote
from revpatch.stream.checksums import Crc32s, checksums_name, checksums_of, unpack_checksums
from revpatch.stream.manifest import Manifest, Shard
from revpatch.stream.tars import HEADER_BYTES, ShardError, member_name, members, stride_of

_READ_BYTES = 2**20
_ADVICE = "copy this file again from where it came, or build the shards again into a new folder"


@dataclass(frozen=True)
class PlacedShard:
    """Shard `index` of the `count` in a set, whose manifest has the digest `digest`: `location` is its path or URL,
    `checksums` that of its checksums, `first_block` the id it begins with."""

    location: str
    index: int
    count: int
    shard: Shard
    first_block: int
    block_bytes: int
    digest: str
    checksums: str

    def error(self, expected: str, found: str, offset: int | None = None, advice: str = _ADVICE) -> ShardError:
        """The error to raise; it names the shard's location and number."""
        message = f"{self.location}: shard {self.index} of {self.count}: expected {expected}, found {found}; {advice}"
        return ShardError(message, self.location, self.index, offset, self.digest)

    def verify(self, descriptor: int) -> None:
        """Hash an open copy of the shard. Raises ShardError when it is not what the manifest says."""
        sha256, size = hashlib.sha256(), 0
        try:
            while chunk := os.pread(descriptor, _READ_BYTES, size):
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
        offset, where = self.damage(descriptor, size)
        raise self.error(f"sha256 {self.shard.sha256}", f"{sha256} ({where})", offset)

    def check_size(self, descriptor: int, size: int) -> None:
        """Compare the size of an open copy. Raises ShardError, with the offset where the damage shows."""
        if size != self.shard.bytes:
            offset, where = self.damage(descriptor, size)
            raise self.error(f"{self.shard.bytes} bytes", f"{size} ({where})", offset)

    def damage(self, descriptor: int, size: int) -> tuple[int | None, str]:
        """The offset of the first damage to an open copy that is not what the manifest says, and a description; None
        when it can't be known."""
        checksums, unknown = self._read_checksums() if size == self.shard.bytes else (None, "")
        if found := self.first_difference(descriptor, size, checksums):
            return found
        return None, f"all but the data of blocks is sound; the offset is unknown: {unknown}"

    def first_difference(self, descriptor: int, size: int, checksums: Crc32s | None = None) -> tuple[int, str] | None:
        """The offset from which on an open copy is not what was built, and a description; None when nothing shows.

        Without `checksums` (blocks,) the tokens of blocks can't be compared. A member that differs anywhere is named by
        its own offset.
        """
        stride, blocks = stride_of(self.block_bytes), self.shard.blocks
        whole = min(blocks, size // stride)
        tokens = slice(HEADER_BYTES, HEADER_BYTES + self.block_bytes)
        step = max(1, _READ_BYTES // stride)
        for start in range(0, whole, step):
            count = min(step, whole - start)
            found = np.empty((count, stride), dtype=np.uint8)
            os.preadv(descriptor, [found.data], start * stride)
            expected = members(np.zeros((count, self.block_bytes), dtype=np.uint8), self.first_block + start)
            differs = found != expected  # in the tokens too, of which nothing is known here
            differs[:, tokens] = False
            wrong = differs.any(axis=1)
            if checksums is not None:
                wrong |= checksums_of(found) != checksums[start : start + count]
            if wrong.any():
                first = int(np.argmax(wrong))
                return (start + first) * stride, self._describe(found[first].tobytes(), start + first)
        if whole < blocks:
            name = member_name(self.first_block + whole)
            offset = whole * stride
            return offset, f"it ends at byte {size}, before the end of member {name} at offset {offset}"
        return self._difference_after(descriptor, blocks * stride, size)

    def _describe(self, member: bytes, number: int) -> str:
        """What is wrong with a member that is not what was built, in words."""
        name = member_name(self.first_block + number)
        at = f"at offset {number * stride_of(self.block_bytes)}"
        try:
            header = tarfile.TarInfo.frombuf(member[:HEADER_BYTES], "utf-8", "replace")
        except tarfile.HeaderError as error:
            return f"no header of member {name} {at}: {error}"
        if header.name != name or header.size != self.block_bytes:
            return f"member {header.name!r} instead of {name} {at}"
        return f"member {name} {at} differs from what was built"

    def _difference_after(self, descriptor: int, end: int, size: int) -> tuple[int, str] | None:
        """`first_difference` after the last member, at `end`, where there are zeros alone."""
        tail = os.pread(descriptor, max(0, min(size, self.shard.bytes) - end), end)
        if rest := tail.lstrip(b"\0"):
            offset = end + len(tail) - len(rest)
            return offset, f"its members are sound, and its end is not zeros alone from offset {offset} on"
        if size != self.shard.bytes:
            offset = min(size, self.shard.bytes)
            return offset, f"its members are sound, and it differs from offset {offset} on"
        return None

    def _read_checksums(self) -> tuple[Crc32s | None, str]:
        """The checksums of the members, (blocks,), or None and why not."""
        try:
            if remote.is_remote(self.checksums):
                data = remote.read_all(self.checksums, retries=1)
            else:
                data = Path(self.checksums).read_bytes()
            checksums = unpack_checksums(data, self.shard.blocks, self.shard.sha256)
        except FileNotFoundError:
            return None, "this set has no checksums of its blocks"
        except (OSError, ValueError) as error:
            return None, f"the checksums of its blocks are of no use ({self.checksums}: {error})"
        return checksums, "every block has its checksum"


def place(location: str, manifest: Manifest) -> list[PlacedShard]:
    """The shards of a set in this folder, which may be an URL or `pipe:`."""

    def path_of(name: str) -> str:
        return remote.url_in(location, name) if remote.is_remote(location) else f"{location}/{name}"

    placed, first_block, count, digest = [], 0, len(manifest.shards), manifest.digest
    for i, shard in enumerate(manifest.shards):
        path, checksums = path_of(shard.name), path_of(checksums_name(shard.name))
        placed.append(PlacedShard(path, i, count, shard, first_block, manifest.block_bytes, digest, checksums))
        first_block += shard.blocks
    return placed
