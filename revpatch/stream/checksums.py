"""Where a shard is damaged: a crc32 of each of its members, in a small file beside the tar.

    shard-000000.crc32   | crc32 of member 0 | crc32 of member 1 | ... | crc32 of the tar's sha256 and all of these |

Each is 4 bytes, little endian, and a member is header, tokens and padding. The sha256 in the manifest says whether a
shard is what was built. Only if it is not, these are looked at: they say from where on it isn't. The last one holds
them to their tar, so that a damaged file, or that of another shard, names no wrong place. Sets that were built before
there were such files have none, and are sets like any other.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

_SUFFIX = ".crc32"

Crc32s = np.ndarray[Any, np.dtype[np.uint32]]


def checksums_name(shard_name: str) -> str:
    """The name of the file beside the shard of this name."""
    return f"{shard_name.removesuffix('.tar')}{_SUFFIX}"


def checksums_of(members: np.ndarray[Any, np.dtype[np.uint8]]) -> Crc32s:
    """The crc32 of each of (n, stride) members, (n,)."""
    return np.fromiter((zlib.crc32(member) for member in members), dtype=np.uint32, count=len(members))


def checksums_bytes(blocks: int) -> int:
    """The size of the file of a shard with so many blocks."""
    return 4 * (blocks + 1)


def pack_checksums(checksums: Crc32s, sha256: str) -> bytes:
    """The file's content; `sha256` (hex) is the tar's."""
    data = checksums.astype("<u4").tobytes()
    return data + zlib.crc32(bytes.fromhex(sha256) + data).to_bytes(4, "little")


def unpack_checksums(data: bytes, blocks: int, sha256: str) -> Crc32s:
    """The crc32 of each member, (blocks,). Raises ValueError when these are not the checksums of that tar."""
    if len(data) != checksums_bytes(blocks):
        raise ValueError(f"expected {checksums_bytes(blocks)} bytes, found {len(data)}")
    checksums = np.frombuffer(data[:-4], dtype="<u4").astype(np.uint32)
    if pack_checksums(checksums, sha256) != data:
        raise ValueError("they are damaged, or of another shard")
    return checksums
