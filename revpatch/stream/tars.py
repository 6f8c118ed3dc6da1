"""How blocks lie in a shard: webdataset tars whose members all have one size.

A member is one block of tokens, named by its number in the whole set, so block i of a shard lies at i × stride
and no table of offsets is needed:

    | header, 512 bytes | block_size tokens, little endian | zeros up to a multiple of 512 |  × blocks  | tar's end |

Time, user, group and mode are fixed: the same blocks give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset.writer import TarWriter

from revpatch.stream.manifest import MANIFEST_NAME, Manifest, Shard, sync_directory

_log = logging.getLogger(__name__)

HEADER_BYTES = 512
DEFAULT_SHARD_BYTES = 64 * 2**20
_SUFFIX = "bin"


class ShardError(ValueError):
    """A shard can't be read, or is not what its manifest says: another size or hash, or another block in a place.

    `location` is its full path or URL, `shard` its index in the manifest whose digest is `digest`, and `offset` the
    first byte that is known to be wrong, or None.
    """

    def __init__(
        self, message: str, location: str = "", shard: int = -1, offset: int | None = None, digest: str = ""
    ) -> None:
        super().__init__(message)
        self.location, self.shard, self.offset, self.digest = location, shard, offset, digest


def member_key(block_id: int) -> str:
    """A block's webdataset key. Wide enough for any corpus, so that every header has one size."""
    return f"{block_id:012d}"


def member_name(block_id: int) -> str:
    """The block's file name within its tar."""
    return f"{member_key(block_id)}.{_SUFFIX}"


def stride_of(block_bytes: int) -> int:
    """Bytes from one member's header to the next one's."""
    return HEADER_BYTES + -(-block_bytes // 512) * 512


def blocks_in(shard_bytes: int, block_bytes: int) -> int:
    """How many blocks fit a shard of about this size; at least one."""
    return max(1, shard_bytes // stride_of(block_bytes))


class ShardWriter:
    """Writes blocks one after another into `directory/shard-000000.tar`, `shard-000001.tar`, ...

    `tokens` given to `write` is a (n, block_size) array; it is stored as `dtype` ('uint16' or 'uint32').
    """

    def __init__(self, directory: Path, dtype: str, blocks_per_shard: int, prefix: str = "shard") -> None:
        if blocks_per_shard < 1:
            raise ValueError(f"blocks_per_shard is {blocks_per_shard}; it must be at least 1")
        self.directory = directory
        self.blocks = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._blocks_per_shard = blocks_per_shard
        self._prefix = prefix
        self._shards: list[Shard] = []
        self._open: _OpenShard | None = None

    def write(self, tokens: np.ndarray[Any, Any]) -> None:
        """Append blocks, opening a new shard whenever the last one is full."""
        for block in tokens.astype(self._dtype):
            if self._open is None:
                self._open = _OpenShard(self.directory / f"{self._prefix}-{len(self._shards):06d}.tar")
            self._open.tar.write({"__key__": member_key(self.blocks), _SUFFIX: block.tobytes()})
            self._open.blocks += 1
            self.blocks += 1
            if self._open.blocks == self._blocks_per_shard:
                self._finish_shard()

    def close(self) -> tuple[Shard, ...]:
        """Finish the last shard and return all of them, in order."""
        if self._open is not None:
            self._finish_shard()
        return tuple(self._shards)

    def abandon(self) -> None:
        """Close the open file, if any, without caring for what is in it."""
        if self._open is not None:
            self._open.abandon()
            self._open = None

    def _finish_shard(self) -> None:
        assert self._open is not None
        self._shards.append(self._open.finish())
        self._open = None


class _OpenShard:
    """The tar that is being written, hashed on its way to the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocks = 0
        self.file: BinaryIO = path.open("wb")
        self.hashed = _HashingFile(self.file)
        self.tar = TarWriter(self.hashed, encoder=False, user="revpatch", group="revpatch", mode=0o644, mtime=0)

    def finish(self) -> Shard:
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return Shard(self.path.name, self.blocks, self.hashed.bytes, self.hashed.sha256.hexdigest())

    def abandon(self) -> None:
        # tarfile would write its end when collected, into a file that is closed by then.
        with contextlib.suppress(OSError):
            self.tar.close()
        with contextlib.suppress(OSError):
            self.file.close()


class _HashingFile:
    """What tarfile's stream mode asks of a file, which is `write` alone."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self._file.write(data)


def refuse_foreign(folder: Path) -> None:
    """Raise FileExistsError when `folder` holds anything but a set of shards, before any work is done for it."""
    if folder.is_dir() and (not any(folder.iterdir()) or (folder / MANIFEST_NAME).is_file()):
        return
    if folder.exists():
        raise FileExistsError(
            f"{folder}: expected a new or empty folder, found {'files that are no set of shards' * folder.is_dir()}"
            f"{'a file' * (not folder.is_dir())}; choose another folder, or remove it first"
        )


def temporary_folder(folder: Path) -> Path:
    """A new, empty folder beside `folder`, on the same disk, so that it can take its name by a rename."""
    temporary = folder.with_name(f".{folder.name}.building-{os.getpid()}-{os.urandom(4).hex()}")
    temporary.mkdir(parents=True)
    return temporary


def check_installable(folder: Path, manifest: Manifest) -> None:
    """Raise FileExistsError when `folder` holds another set than the one that is to be installed."""
    refuse_foreign(folder)
    if not (folder / MANIFEST_NAME).is_file():
        return
    found = Manifest.read(folder)
    if found.digest != manifest.digest:
        differing = [name for name in vars(manifest) if getattr(manifest, name) != getattr(found, name)]
        raise FileExistsError(
            f"{folder}: holds another set of shards (it differs in {', '.join(differing)}); "
            "choose another folder, or remove this one first"
        )


def install_folder(temporary: Path, folder: Path, manifest: Manifest) -> None:
    """Give a whole set its name. A set that has it already stays, and must be the same one (FileExistsError)."""
    sync_directory(temporary)
    try:
        temporary.rename(folder)  # succeeds over an empty folder, fails over one that holds something
    except OSError:
        check_installable(folder, manifest)
        if not folder.is_dir():
            raise
        _log.info("%s: this very set of shards is there already; left as it is", folder)
        return
    sync_directory(folder.parent)
