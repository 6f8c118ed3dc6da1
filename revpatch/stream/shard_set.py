"""A built set of shards, opened for reading any block of it: a local folder, or one behind an URL or a command.

tarfile takes a tar that is cut or overwritten in the middle for one that ends there, so nothing is left to it: a shard
is hashed against the manifest before its first block is handed out, and every block's header must bear the block's own
name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from revpatch.stream import remote
from revpatch.stream.local_files import LocalFiles
from revpatch.stream.manifest import MANIFEST_NAME, Manifest
from revpatch.stream.placed_shard import PlacedShard, place
from revpatch.stream.shard_cache import ShardCache
from revpatch.stream.tars import HEADER_BYTES, ShardError, member_name, stride_of

_NAME_BYTES = len(member_name(0)) + 1
_DIGITS = 10 ** np.arange(11, -1, -1, dtype=np.int64)

Int64s = np.ndarray[Any, np.dtype[np.int64]]


class ShardSet:
    """The blocks of a set, by number. Reading is safe from several threads. Close it, or use it as a context.

    Args:
        location: a local folder, which is read in place; the URL of a folder (http, https, or any protocol of fsspec);
            or `pipe:COMMAND`, in which `{name}` stands for a file's name.
        cache: where the shards of a set that is not local are kept. It stays the caller's to close.

    Raises FileNotFoundError when there is no manifest, ValueError when that is not sound, when the location makes no
    sense or when a cache is missing, and ConnectionError when the host can't be reached.
    """

    def __init__(self, location: str | Path, cache: ShardCache | None = None) -> None:
        self.location = str(location)
        self.is_local = not remote.is_remote(self.location)
        self._files: LocalFiles | ShardCache
        if self.is_local:
            self.location = str(Path(location).absolute())
            self.manifest = Manifest.read(self.location)
            self._files = LocalFiles()
        else:
            if cache is None:
                raise ValueError(
                    f"{self.location}: shards that are not local are kept in a cache, found none; "
                    "set stream.shard_cache to a folder on a local disk"
                )
            self.manifest = _fetch_manifest(self.location, cache.retries)
            self._files = cache
        self.block_size = self.manifest.block_size
        self._stride = stride_of(self.manifest.block_bytes)
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._placed = place(self.location, self.manifest)
        self._broken: dict[int, ShardError] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.manifest.blocks

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files of a local set. A later read opens them again."""
        if isinstance(self._files, LocalFiles):
            with self._lock:
                self._files.close()

    def read(self, block_ids: np.ndarray[Any, Any]) -> Int64s:
        """The tokens of these blocks, (n,) -> (n, block_size) int64, in the order asked for.

        Raises IndexError for an id that is not in the set, ShardError for a shard that is broken or can't be had, at
        once when that is known already, and ShardCacheError (a ValueError) when the cache has no room for it.
        """
        block_ids = self._checked(block_ids)
        order = np.argsort(block_ids, kind="stable")
        ordered = block_ids[order]
        with self._lock:
            members = self._read_members(ordered)
        tokens = np.empty((len(ordered), self.block_size), dtype=np.int64)
        tokens[order] = members[:, HEADER_BYTES : HEADER_BYTES + self.manifest.block_bytes].view(self._dtype)
        return tokens

    def shards_of(self, block_ids: np.ndarray[Any, Any]) -> Int64s:
        """The index of the shard that each block lies in, (n,) -> (n,) int64. Raises IndexError as `read` does."""
        return self.manifest.shards_of(self._checked(block_ids))

    def want(self, shards: Iterable[int]) -> None:
        """Have these shards fetched in the background. A local set has them already."""
        if isinstance(self._files, ShardCache):
            self._files.want([self._placed[shard] for shard in shards if shard not in self._broken])

    def check_sizes(self) -> None:
        """Raise ShardError for the first shard of a local set that is missing or has another size."""
        if not self.is_local:
            return
        for placed in self._placed:
            path = Path(placed.location)
            if not path.is_file():
                raise placed.error("a file", "nothing")
            if (size := path.stat().st_size) != placed.shard.bytes:
                with path.open("rb") as file:
                    placed.check_size(file.fileno(), size)

    def verify(self) -> None:
        """Hash every shard that has not been. Raises ShardError for the first one that is broken."""
        for placed in self._placed:
            with self._lock:
                self._acquire(placed)
                self._files.release(placed)

    def _checked(self, block_ids: np.ndarray[Any, Any]) -> Int64s:
        block_ids = np.asarray(block_ids, dtype=np.int64)
        if len(block_ids) and not 0 <= block_ids.min() <= block_ids.max() < len(self):
            raise IndexError(f"{self.location}: block ids are 0 to {len(self) - 1}, found {block_ids.tolist()}")
        return block_ids

    def _read_members(self, ordered: Int64s) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The members of these sorted ids, header and padding included, (n,) -> (n, stride); neighbours in one go."""
        members = np.empty((len(ordered), self._stride), dtype=np.uint8)
        shards = self.manifest.shards_of(ordered)
        is_first = np.ones(len(ordered), dtype=bool)  # of a run of neighbours in one shard
        is_first[1:] = (np.diff(ordered) != 1) | (np.diff(shards) != 0)
        starts = np.flatnonzero(is_first)
        stops = np.append(starts[1:], len(ordered))[: len(starts)]
        for shard, start, stop in zip(shards[starts].tolist(), starts.tolist(), stops.tolist(), strict=True):
            placed = self._placed[shard]
            descriptor = self._acquire(placed)
            try:
                self._read_run(placed, descriptor, int(ordered[start]), members[start:stop])
            finally:
                self._files.release(placed)
        self._check_names(ordered, shards, members)
        return members

    def _acquire(self, placed: PlacedShard) -> int:
        """A descriptor of the verified shard. A broken one is found so once, and from then on it is known."""
        if placed.index in self._broken:
            raise self._broken[placed.index].with_traceback(None)
        try:
            return self._files.acquire(placed)
        except ShardError as error:
            self._broken[placed.index] = error
            raise

    def _read_run(self, placed: PlacedShard, descriptor: int, block_id: int, members: np.ndarray[Any, Any]) -> None:
        """Fill `members`, (n, stride), with blocks block_id, block_id + 1, ..."""
        offset = (block_id - placed.first_block) * self._stride
        try:
            found = os.preadv(descriptor, [members.data], offset)
        except OSError as error:
            raise placed.error("a file that can be read", str(error), offset) from error
        if found != members.nbytes:
            # The shard was hashed, so what is seen here is a file that was changed since.
            last = offset + found // self._stride * self._stride
            raise placed.error(f"{self._stride} bytes at offset {last}", str(offset + found - last), last)

    def _check_names(self, ordered: Int64s, shards: Int64s, members: np.ndarray[Any, Any]) -> None:
        """Every header must begin with its block's name: again, the file may have been changed."""
        expected = np.zeros((len(ordered), _NAME_BYTES), dtype=np.uint8)
        expected[:] = np.frombuffer(member_name(0).encode() + b"\0", dtype=np.uint8)
        expected[:, : len(_DIGITS)] += (ordered[:, None] // _DIGITS % 10).astype(np.uint8)
        wrong = np.flatnonzero((members[:, :_NAME_BYTES] != expected).any(axis=1))
        if len(wrong):
            placed, block_id = self._placed[shards[wrong[0]]], int(ordered[wrong[0]])
            offset = (block_id - placed.first_block) * self._stride
            found = bytes(members[wrong[0], :_NAME_BYTES])
            raise placed.error(f"member {member_name(block_id)} at offset {offset}", repr(found), offset)


def _fetch_manifest(location: str, retries: int) -> Manifest:
    url = remote.url_in(location, MANIFEST_NAME)
    try:
        return Manifest.from_json(remote.read_all(url, retries), url)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{url}: there is no manifest, so {location} is not a whole set of shards; check the URL, or copy the "
            "whole folder there"
        ) from error
