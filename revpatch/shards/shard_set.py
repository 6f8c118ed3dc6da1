"""Built sets of shards, opened for reading any block: a local folder or one behind an URL; several as one.

    set 0: 0 .. n0-1     set 1: n0 .. n0+n1-1     ...       one numbering of blocks in a `Corpus`

tarfile takes a tar that is cut in the middle for one that ends there, so nothing is left to it: a shard is hashed
against the manifest before its first block is handed out, and again when its file has changed since.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from revpatch.shards import remote
from revpatch.shards.cache import OpenShard, OpenShards, PlacedShard, ShardCache
from revpatch.shards.format import HEADER_BYTES, MANIFEST_NAME, Manifest, Shard, ShardError, stride_of

Int64s = np.ndarray[Any, np.dtype[np.int64]]

_READ_BYTES = 2**22


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
        self._files: OpenShards | ShardCache
        if self.is_local:
            self.location = str(Path(location).absolute())
            self.manifest = Manifest.read(self.location)
            self._files = OpenShards(_open_local)
        else:
            if cache is None:
                raise ValueError(
                    f"{self.location}: shards that are not local are kept in a cache, found none; "
                    "set stream.shard_cache to a folder on a local disk"
                )
            self.manifest = _fetch_manifest(self.location)
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
        if self.is_local:
            self._files.close()

    def read(self, block_ids: np.ndarray[Any, Any]) -> Int64s:
        """Return the tokens of these blocks, (n,) -> (n, block_size) int64, in the order asked for.

        Raises IndexError for an id that is not in the set, ShardError for a shard that is broken or can't be had, at
        once when that is known already, and ShardCacheError (a ValueError) when the cache has no room for it.
        """
        block_ids = self._checked(block_ids)
        order = np.argsort(block_ids, kind="stable")
        with self._lock:
            members = self._read_members(block_ids[order])
        tokens = np.empty((len(order), self.block_size), dtype=np.int64)
        tokens[order] = members[:, HEADER_BYTES : HEADER_BYTES + self.manifest.block_bytes].view(self._dtype)
        return tokens

    def shards_of(self, block_ids: np.ndarray[Any, Any]) -> Int64s:
        """Return the index of the shard of each block, (n,) -> (n,) int64. Raises IndexError as `read` does."""
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
            placed.check_size(path.stat().st_size)

    def verify(self) -> None:
        """Hash every shard that has not been. Raises ShardError for the first one that is broken."""
        for placed in self._placed:
            with self._lock:
                self._open(placed)

    def _checked(self, block_ids: np.ndarray[Any, Any]) -> Int64s:
        block_ids = np.asarray(block_ids, dtype=np.int64)
        if len(block_ids) and not 0 <= block_ids.min() <= block_ids.max() < len(self):
            raise IndexError(f"{self.location}: block ids are 0 to {len(self) - 1}, found {block_ids.tolist()}")
        return block_ids

    def _read_members(self, ordered: Int64s) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the members of these sorted ids with header and padding, (n,) -> (n, stride); neighbours in one go."""
        members = np.empty((len(ordered), self._stride), dtype=np.uint8)
        shards = self.manifest.shards_of(ordered)
        is_first = np.ones(len(ordered), dtype=bool)  # of a run of neighbours in one shard
        is_first[1:] = (np.diff(ordered) != 1) | (np.diff(shards) != 0)
        starts = np.flatnonzero(is_first)
        stops = np.append(starts[1:], len(ordered))[: len(starts)]
        for shard, start, stop in zip(shards[starts].tolist(), starts.tolist(), stops.tolist(), strict=True):
            placed = self._placed[shard]
            file, run = self._open(placed), members[start:stop]
            try:
                found = os.preadv(file.descriptor, [run.data], (ordered[start] - placed.first_block) * self._stride)
            except OSError as error:
                raise placed.error("a file that can be read", str(error)) from error
            if found != run.nbytes:  # it was hashed, so it is being cut at this very moment
                raise placed.error(f"{placed.shard.bytes} bytes", "a file that was cut while it was read")
        return members

    def _open(self, placed: PlacedShard) -> OpenShard:
        """Return a verified shard. A broken one is found so once, and from then on it is known."""
        if placed.index in self._broken:
            raise self._broken[placed.index].with_traceback(None)
        try:
            return self._files.get(placed)
        except ShardError as error:
            self._broken[placed.index] = error
            raise


@dataclass(frozen=True)
class ShardReport:
    """One shard that was read whole; `faults` says in words what is wrong with it, and is empty for a sound one."""

    path: Path
    shard: Shard
    faults: tuple[str, ...]


def verify_shards(directory: Path, read: Callable[[int], None] = lambda _: None) -> Iterator[ShardReport]:
    """Read and hash every shard of a folder, in order; `read` is told how many bytes each time.

    Raises FileNotFoundError when there is no manifest and ValueError when that is not sound.
    """
    for placed in place(str(directory), Manifest.read(directory)):
        path, shard = Path(placed.location), placed.shard
        sha256, size, faults = hashlib.sha256(), 0, []
        try:
            with path.open("rb") as file:
                while data := file.read(_READ_BYTES):
                    sha256.update(data)
                    size += len(data)
                    read(len(data))
            if size != shard.bytes:
                faults.append(f"expected {shard.bytes} bytes, found {size}")
            if sha256.hexdigest() != shard.sha256:
                faults.append(f"expected sha256 {shard.sha256}, found {sha256.hexdigest()}")
        except OSError as error:
            faults.append(f"it can't be read: {error.strerror}")
        yield ShardReport(path, shard, tuple(faults))


def sample_blocks(directory: Path, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the ids of `count` blocks spread evenly over a set, and their tokens, (count, block_size)."""
    with ShardSet(directory) as shards:
        ids = np.unique(np.linspace(0, len(shards) - 1, count).astype(np.int64))
        return ids, shards.read(ids)


def place(location: str, manifest: Manifest) -> list[PlacedShard]:
    """Return the shards of a set in this folder, which may be an URL or `pipe:`."""
    placed, first_block = [], 0
    for i, shard in enumerate(manifest.shards):
        path = remote.url_in(location, shard.name) if remote.is_remote(location) else f"{location}/{shard.name}"
        placed.append(PlacedShard(path, i, len(manifest.shards), shard, first_block, manifest.digest))
        first_block += shard.blocks
    return placed


def _open_local(placed: PlacedShard) -> int:
    try:
        return os.open(placed.location, os.O_RDONLY)
    except FileNotFoundError as error:
        raise placed.error("a file", "nothing") from error
    except OSError as error:
        raise placed.error("a file that can be read", str(error)) from error


def _fetch_manifest(location: str) -> Manifest:
    url = remote.url_in(location, MANIFEST_NAME)
    try:
        return Manifest.from_json(remote.read_all(url), url)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{url}: there is no manifest, so {location} is not a whole set of shards; check the URL, or copy the "
            "whole folder there"
        ) from error


class Corpus:
    """The blocks of all `sets`, one set's after the other's.

    Raises ValueError for no sets, and for sets of different block sizes or tokenizers.
    """

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        if not sets:
            raise ValueError("a corpus needs at least one set of shards")
        for other in sets[1:]:
            check_alike(sets[0], other)
        self.sets = tuple(sets)
        self.block_size = sets[0].block_size
        self._ends = np.cumsum([len(shards) for shards in sets], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def digests(self) -> list[str]:
        """The digest of each set's manifest."""
        return [shards.manifest.digest for shards in self.sets]

    def locate(self, block_ids: np.ndarray[Any, Any]) -> Iterator[tuple[ShardSet, Int64s, Int64s]]:
        """Each set that holds some of these blocks, which of them (rows, (m,) int64), and their numbers in it, (m,).

        Raises IndexError for a number that no block has.
        """
        block_ids = np.asarray(block_ids, dtype=np.int64)
        if len(block_ids) and not 0 <= block_ids.min() <= block_ids.max() < len(self):
            raise IndexError(f"blocks are 0 to {len(self) - 1}, found {block_ids.tolist()}")
        which = np.searchsorted(self._ends, block_ids, side="right")
        for index in np.unique(which).tolist():
            rows = np.flatnonzero(which == index)
            yield self.sets[index], rows, block_ids[rows] - (int(self._ends[index]) - len(self.sets[index]))

    def read(self, block_ids: np.ndarray[Any, Any]) -> Int64s:
        """Return the tokens of these blocks, (n,) -> (n, block_size) int64, in the order asked for.

        Raises IndexError for a number that no block has and ShardError for a shard that is broken.
        """
        tokens = np.empty((len(block_ids), self.block_size), dtype=np.int64)
        for shards, rows, numbers in self.locate(block_ids):
            tokens[rows] = shards.read(numbers)
        return tokens


def check_alike(one: ShardSet, other: ShardSet) -> None:
    """Raises ValueError if two sets can't be mixed: their blocks differ in size, or another tokenizer made them."""
    mine, theirs = one.manifest, other.manifest
    for what, expected, found in (
        ("block_size", mine.block_size, theirs.block_size),
        ("tokenizer", mine.tokenizer.fingerprint, theirs.tokenizer.fingerprint),
        ("what documents begin with", list(mine.tokenizer.bos_token_ids), list(theirs.tokenizer.bos_token_ids)),
    ):
        if found != expected:
            raise ValueError(
                f"sets of shards differ in {what}: {expected} in {one.location}, {found} in {other.location}; build "
                "them with the same tokenizer and block_size"
            )
