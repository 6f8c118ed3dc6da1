"""A built folder of shards, opened for reading any block of it.

tarfile takes a tar that is cut or overwritten in the middle for one that ends there, so nothing is left to it: sizes
are compared when the set is opened, a shard is hashed against the manifest before its first block is handed out, and
every block's header must bear the block's own name.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.gopen import gopen

from revpatch.stream.manifest import Manifest
from revpatch.stream.tars import HEADER_BYTES, ShardError, member_name, stride_of

_OPEN_FILES = 64
_HASH_CHUNK = 2**20


class ShardSet:
    """The blocks of `directory`, by number.

    Raises FileNotFoundError when the folder has no manifest, ValueError when that is not sound, and ShardError when
    a shard is missing or has another size. Reading is safe from several threads. Close it, or use it as a context.
    """

    def __init__(self, directory: str | Path, cache=None) -> None:
        self.location = str(directory)
        self.directory = Path(directory).absolute()
        self.manifest = Manifest.read(self.directory)
        self.block_size = self.manifest.block_size
        self._stride = stride_of(self.manifest.block_bytes)
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._ends = np.cumsum([shard.blocks for shard in self.manifest.shards], dtype=np.int64)
        self._verified: set[int] = set()
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recently used first
        self._lock = threading.Lock()

    def want(self, shards): ...
    def shards_of(self, ids):
        return np.searchsorted(self._ends, ids, side="right")

    def check_sizes(self):
        for i, shard in enumerate(self.manifest.shards):
            path = self.directory / shard.name
            if not path.is_file():
                self._fail(i, "a file", "nothing")
            if path.stat().st_size != shard.bytes:
                self._fail(i, f"{shard.bytes} bytes", f"{path.stat().st_size}")

    def __len__(self) -> int:
        return self.manifest.blocks

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. A later read opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def read(self, block_ids: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The tokens of these blocks, (n,) -> (n, block_size) int64, in the order asked for.

        Raises IndexError for an id that is not in the set and ShardError for a shard that is broken.
        """
        block_ids = np.asarray(block_ids, dtype=np.int64)
        if len(block_ids) and not 0 <= block_ids.min() <= block_ids.max() < len(self):
            raise IndexError(f"{self.directory}: block ids are 0 to {len(self) - 1}, found {block_ids.tolist()}")
        tokens = np.empty((len(block_ids), self.block_size), dtype=np.int64)
        shards = np.searchsorted(self._ends, block_ids, side="right")
        with self._lock:
            for row, (shard, block_id) in enumerate(zip(shards.tolist(), block_ids.tolist(), strict=True)):
                tokens[row] = self._read_block(shard, block_id)
        return tokens

    def verify(self) -> None:
        """Hash every shard that has not been. Raises ShardError for the first one that is broken."""
        with self._lock:
            for i in range(len(self.manifest.shards)):
                self._verify_shard(i)

    def _read_block(self, shard: int, block_id: int) -> np.ndarray[Any, Any]:
        descriptor = self._descriptor(shard)
        first = int(self._ends[shard]) - self.manifest.shards[shard].blocks
        offset = (block_id - first) * self._stride
        member = os.pread(descriptor, HEADER_BYTES + self.manifest.block_bytes, offset)
        name = member_name(block_id).encode() + b"\0"
        # The shard was hashed, so what is seen here is a file that was changed since.
        if len(member) != HEADER_BYTES + self.manifest.block_bytes:
            self._fail(shard, f"{HEADER_BYTES + self.manifest.block_bytes} bytes at offset {offset}", f"{len(member)}")
        if not member.startswith(name):
            self._fail(shard, f"member {member_name(block_id)} at offset {offset}", repr(member[: len(name)]))
        return np.frombuffer(member, dtype=self._dtype, offset=HEADER_BYTES)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            self._verify_shard(shard)
            try:
                self._files[shard] = os.open(self.directory / self.manifest.shards[shard].name, os.O_RDONLY)
            except OSError as error:
                self._fail(shard, "a file that can be read", str(error))
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def _verify_shard(self, shard: int) -> None:
        if shard in self._verified:
            return
        sha256 = hashlib.sha256()
        size = 0
        try:
            with gopen(str(self.directory / self.manifest.shards[shard].name), "rb") as file:
                while chunk := file.read(_HASH_CHUNK):
                    sha256.update(chunk)
                    size += len(chunk)
        except OSError as error:
            self._fail(shard, "a file that can be read", str(error))
        if size != self.manifest.shards[shard].bytes:
            self._fail(shard, f"{self.manifest.shards[shard].bytes} bytes", f"{size}")
        if sha256.hexdigest() != self.manifest.shards[shard].sha256:
            self._fail(shard, f"sha256 {self.manifest.shards[shard].sha256}", sha256.hexdigest())
        self._verified.add(shard)

    def _fail(self, shard: int, expected: str, found: str) -> None:
        path = self.directory / self.manifest.shards[shard].name
        raise ShardError(
            f"{path}: shard {shard} of {len(self.manifest.shards)}: expected {expected}, found {found}; "
            "copy this file again from where it came, or build the shards again into a new folder",
            location=str(path),
            shard=shard,
            digest=self.manifest.digest,
        )
