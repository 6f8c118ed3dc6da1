"""How blocks lie in a shard: webdataset tars whose members all have one size.

A member is one block of tokens, named by its number in the whole set, so block i of a shard lies at i × stride
and no table of offsets is needed:

    | header, 512 bytes | block_size tokens, little endian | zeros up to a multiple of 512 |  × blocks  | tar's end |

Time, user, group and mode are fixed: the same blocks give the same bytes, those of webdataset's own TarWriter.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tarfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from revpatch.durable import sync_directory
from revpatch.stream.manifest import MANIFEST_NAME, Manifest, Shard

_log = logging.getLogger(__name__)

HEADER_BYTES = 512
DEFAULT_SHARD_BYTES = 64 * 2**20
_SUFFIX = "bin"
_KEY_DIGITS = 12
_COPY_BYTES = 2**20


@dataclass(frozen=True)
class ShardFault:
    """A shard that can't be read, or is not what its manifest says: what ranks tell one another, the quarantine keeps
    and the journal writes."""

    digest: str
    """Of the manifest of its set."""
    shard: int
    """Its index in that manifest."""
    location: str
    """Full path or URL."""
    reason: str
    since: int | None = None
    """Step of the run from which on it is read around; None until it is taken out."""

    def as_fields(self) -> dict[str, Any]:
        """Return what the journal and a snapshot keep of it."""
        return {key: getattr(self, key) for key in ("digest", "shard", "since", "location", "reason")}


class ShardError(ValueError):
    """A shard can't be read, or has another size or sha256 than its manifest says; `fault` is None where no one shard
    is to blame."""

    def __init__(self, message: str, fault: ShardFault | None = None) -> None:
        super().__init__(message)
        self.fault = fault


def member_key(block_id: int) -> str:
    """A block's webdataset key. Wide enough for any corpus, so that every header has one size."""
    return f"{block_id:0{_KEY_DIGITS}d}"


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
        self.shards: list[Shard] = []
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._blocks_per_shard = blocks_per_shard
        self._prefix = prefix
        self._open: _OpenShard | None = None

    @property
    def open_blocks(self) -> int:
        """How many blocks of `blocks` are in the shard that is not finished."""
        return self._open.blocks if self._open is not None else 0

    def write(self, tokens: np.ndarray[Any, Any]) -> None:
        """Append blocks, opening a new shard whenever the last one is full."""
        while len(tokens):
            if self._open is None:
                self._open = _OpenShard(self._next_path())
            now = tokens[: self._blocks_per_shard - self._open.blocks]
            self._open.write(members(now.astype(self._dtype), self.blocks))
            self.blocks += len(now)
            tokens = tokens[len(now) :]
            if self._open.blocks == self._blocks_per_shard:
                self._finish_shard()

    def sync(self) -> None:
        """Bring what was written to the disk, so that it is there after a loss of power."""
        if self._open is not None:
            os.fsync(self._open.file.fileno())

    def resume(self, shards: list[Shard], open_blocks: int, block_bytes: int) -> None:
        """Go on after these finished shards and so many blocks of the next one, whatever else its file holds.

        Raises ShardError when a file is missing or shorter than that.
        """
        for shard in shards:
            _check_length(self.directory / shard.name, shard.bytes, exact=True)
        self.shards = list(shards)
        self.blocks = sum(shard.blocks for shard in shards) + open_blocks
        if open_blocks:
            self._open = _OpenShard(self._next_path(), open_blocks, stride_of(block_bytes))

    def close(self) -> tuple[Shard, ...]:
        """Finish the last shard and return all of them, in order."""
        if self._open is not None:
            self._finish_shard()
        return tuple(self.shards)

    def abandon(self) -> None:
        """Close the open file, if any, without caring for what is in it."""
        if self._open is not None:
            self._open.file.close()
            self._open = None

    def _next_path(self) -> Path:
        return self.directory / f"{self._prefix}-{len(self.shards):06d}.tar"

    def _finish_shard(self) -> None:
        assert self._open is not None
        self.shards.append(self._open.finish())
        self._open = None


def members(blocks: np.ndarray[Any, Any], first_id: int) -> np.ndarray[Any, Any]:
    """The tar members of (n, block_size) blocks, numbered from `first_id`, as (n, stride) bytes.

    Headers are made for all blocks at once; Python's tarfile takes longer for one than the tokenizer for its block.
    """
    count, block_bytes = len(blocks), blocks.shape[1] * blocks.itemsize
    rows = np.zeros((count, stride_of(block_bytes)), dtype=np.uint8)
    rows[:, :HEADER_BYTES] = np.frombuffer(_header(block_bytes), dtype=np.uint8)
    ids = np.arange(first_id, first_id + count)
    rows[:, :_KEY_DIGITS] = _digits(ids, 10, _KEY_DIGITS)
    checksums = rows[:, :HEADER_BYTES].sum(axis=1, dtype=np.int64)
    rows[:, 148:154] = _digits(checksums, 8, 6)
    rows[:, 154] = 0
    rows[:, HEADER_BYTES : HEADER_BYTES + block_bytes] = np.ascontiguousarray(blocks).view(np.uint8)
    return rows


def _header(block_bytes: int) -> bytes:
    """The header of block 0, with spaces for the checksum's digits, as they count in the sum."""
    info = tarfile.TarInfo(member_name(0))
    info.size, info.mode, info.mtime = block_bytes, 0o644, 0
    info.uname = info.gname = "revpatch"
    header = bytearray(info.tobuf(tarfile.PAX_FORMAT))
    # The sum is taken over 8 spaces, and written as 6 digits, a zero byte and a space.
    header[148:156] = b" " * 8
    return bytes(header)


def _digits(numbers: np.ndarray[Any, Any], base: int, count: int) -> np.ndarray[Any, Any]:
    """The ASCII digits of (n,) numbers, with leading zeros, as (n, count) bytes."""
    powers = base ** np.arange(count - 1, -1, -1, dtype=np.int64)
    return (numbers[:, None] // powers % base + ord("0")).astype(np.uint8)


class _OpenShard:
    """The tar that is being written, hashed on its way to the disk."""

    def __init__(self, path: Path, blocks: int = 0, stride: int = 0) -> None:
        """Goes on after so many blocks of the file, if any."""
        self.path = path
        self.blocks = blocks
        self.bytes = blocks * stride
        self.sha256 = hashlib.sha256()
        if blocks:
            _check_length(path, self.bytes, exact=False)
            with path.open("rb") as file:
                while data := file.read(min(_COPY_BYTES, self.bytes - file.tell())):
                    self.sha256.update(data)
        self.file = path.open("r+b" if blocks else "wb", buffering=0)
        self.file.truncate(self.bytes)
        self.file.seek(self.bytes)

    def write(self, rows: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Append (n, stride) members."""
        self._append(rows.reshape(-1).data)
        self.blocks += len(rows)

    def finish(self) -> Shard:
        """End the tar."""
        end = 2 * 512  # of zeros, and more of them up to a whole record
        self._append(memoryview(bytes(end + -(self.bytes + end) % tarfile.RECORDSIZE)))
        os.fsync(self.file.fileno())
        self.file.close()
        return Shard(self.path.name, self.blocks, self.bytes, self.sha256.hexdigest())

    def _append(self, data: memoryview) -> None:
        self.sha256.update(data)
        self.bytes += len(data)
        while data:  # a disk that is nearly full takes a part
            data = data[self.file.write(data) :]


def _check_length(path: Path, length: int, *, exact: bool) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found is None or found < length or (exact and found != length):
        raise ShardError(
            f"{path}: expected {'' if exact else 'at least '}{length} bytes, found {found if found else 'nothing'}; "
            f"the unfinished build is damaged: delete {path.parent.parent} and build anew"
        )


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
        differing = [key.name for key in fields(manifest) if getattr(manifest, key.name) != getattr(found, key.name)]
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
