"""Copies of remote shards on the local disk: fetched once a machine, ahead of their use if asked for, and verified."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from revpatch.stream import remote
from revpatch.stream.cache_folder import CacheFolder
from revpatch.stream.placed_shard import PlacedShard
from revpatch.stream.tars import ShardError

_log = logging.getLogger(__name__)

IDLE_SECONDS = 2.0
ROOM_SECONDS = 15.0
_POLL_SECONDS = 0.02
_OPEN_FILES = 64
_WANTED = 256
_WRONG_CONTENTS = 2
_ADVICE = "look whether the host can be reached and the file is there; if it is gone, copy it there again"


@dataclass
class _Held:
    """An open copy. It may be closed when no reader pins it."""

    descriptor: int
    pins: int = 0
    used: float = 0.0


class ShardCache:
    """Local copies of shards, at most `max_bytes` of them in `folder`, which all processes of a machine may share.

    A shard is fetched by one of them while the others wait. The least recently used one that nobody reads makes room.
    A copy is hashed once by each process before its first use. Safe for threads; close it, or use it as a context.

    Args:
        folder: on a local disk; made if it is not there.
        max_bytes: of all files in the folder, those being fetched included.
        retries: attempts at a file after the first one has failed.

    Raises ValueError (ShardCacheError is one) for a budget of nothing or a folder that can't be made.
    """

    def __init__(self, folder: str | Path, max_bytes: int, retries: int = 5) -> None:
        if retries < 0:
            raise ValueError(f"retries is {retries}; it must be at least 0 (stream.retries)")
        self.retries = retries
        self._folder = CacheFolder(Path(folder).absolute(), max_bytes)
        self._lock = threading.Lock()
        self._held: OrderedDict[str, _Held] = OrderedDict()  # by sha256, least recently used first
        self._verified: set[str] = set()
        self._fetched: set[str] = set()
        self._wanted: set[str] = set()
        self._queue: queue.Queue[PlacedShard] = queue.Queue(_WANTED)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ShardCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what nobody reads, and let the thread end with the fetch it is in. A later use opens again."""
        with self._lock:
            self._closing.set()
            self._thread = None
            self._close_idle(0.0)

    def acquire(self, placed: PlacedShard) -> int:
        """A descriptor of a verified copy of the shard, fetched if need be, good until it is released.

        Raises ShardError when the shard can't be had or is broken, ShardCacheError when there is no room for it, and
        ValueError when its URL needs a package that is not installed.
        """
        sha256 = placed.shard.sha256
        with self._lock:
            held = self._held.get(sha256)
            if held is not None:
                held.pins += 1
                self._held.move_to_end(sha256)
                return held.descriptor
        descriptor = self._obtain(placed, in_background=False)
        with self._lock:
            self._start_thread()
            if sha256 in self._held:  # another thread was faster
                os.close(descriptor)
            held = self._held.setdefault(sha256, _Held(descriptor))
            held.pins += 1
            self._close_idle(IDLE_SECONDS)
            while len(self._held) > _OPEN_FILES and self._close_oldest():
                pass
            return held.descriptor

    def release(self, placed: PlacedShard) -> None:
        """Done with what `acquire` gave. It stays open for a while."""
        with self._lock:
            held = self._held[placed.shard.sha256]
            held.pins -= 1
            held.used = time.monotonic()

    def want(self, shards: Iterable[PlacedShard]) -> None:
        """Fetch these in the background. An error is kept quiet: who reads the shard meets it then."""
        with self._lock:
            for placed in shards:
                sha256 = placed.shard.sha256
                if sha256 in self._wanted or sha256 in self._held:
                    continue
                try:
                    self._queue.put_nowait(placed)
                except queue.Full:  # it is a wish, not an order
                    break
                self._wanted.add(sha256)
            self._start_thread()

    def _obtain(self, placed: PlacedShard, in_background: bool) -> int:
        """A locked descriptor of a verified copy, whoever fetches it."""
        deadline: float | None = None  # of waiting for room; another's fetch takes what it takes
        began = time.time()
        while True:
            descriptor = self._open_verified(placed)
            if descriptor is not None:
                return descriptor
            try:
                descriptor = self._fetch(placed, began)
            except BlockingIOError:
                if not in_background:
                    with self._lock:
                        if self._close_oldest():
                            continue
                deadline = deadline or time.monotonic() + ROOM_SECONDS
                if in_background or time.monotonic() > deadline:
                    raise self._folder.no_room(placed.shard.bytes) from None
            if descriptor is not None:
                return descriptor
            time.sleep(_POLL_SECONDS)

    def _open_verified(self, placed: PlacedShard) -> int | None:
        sha256 = placed.shard.sha256
        descriptor = self._folder.open(sha256)
        if descriptor is None or sha256 in self._verified:
            return descriptor
        try:
            placed.verify(descriptor)
        except ShardError as error:
            _log.warning("%s: the cached copy is damaged, and is fetched again: %s", self._folder.folder, error)
            self._folder.discard(sha256, descriptor)
            return None
        self._verified.add(sha256)
        return descriptor

    def _fetch(self, placed: PlacedShard, began: float) -> int | None:
        """Fetch the shard, unless another thread or process does or did. Raises BlockingIOError for want of room.

        Raises what another has met since this one `began` to wait for it: all ranks of a machine may wait for a shard
        that is gone, and one round of attempts is enough for them.
        """
        sha256 = placed.shard.sha256
        descriptor = self._folder.reserve(sha256, placed.shard.bytes)
        if descriptor is None:
            return None
        try:
            if why := self._folder.failure_since(sha256, began):
                told = json.loads(why)
                raise ShardError(**told, location=placed.location, shard=placed.index, digest=placed.digest)
            self._download(placed, descriptor)
            self._folder.keep(sha256, descriptor)
        except BaseException as error:
            if isinstance(error, ShardError):
                self._folder.note_failure(sha256, json.dumps({"message": str(error), "offset": error.offset}))
            self._folder.abandon(sha256, descriptor)
            raise
        if sha256 in self._fetched:
            _log.warning(
                "%s was fetched a second time: a cache of %d bytes does not hold the shards that are read in turn; "
                "raise stream.shard_cache_gb, or lower stream.shuffle_blocks (a remote replay.base must fit it whole)",
                placed.location,
                self._folder.max_bytes,
            )
        self._fetched.add(sha256)
        self._verified.add(sha256)
        return descriptor

    def _download(self, placed: PlacedShard, descriptor: int) -> None:
        """Fill the file. Raises ShardError when no attempt brings the shard."""
        wrong = received = 0

        def attempt() -> None:
            nonlocal received
            sha256, received = hashlib.sha256(), 0
            for chunk in remote.stream(placed.location):
                received += len(chunk)
                if received > placed.shard.bytes:
                    raise placed.error(f"{placed.shard.bytes} bytes", "more", placed.shard.bytes)
                self._write(descriptor, chunk, received - len(chunk))
                sha256.update(chunk)
            placed.check(descriptor, received, sha256.hexdigest())

        def final(error: Exception) -> bool:
            nonlocal wrong
            if not isinstance(error, ShardError):
                return remote.is_final(error)
            wrong += received >= placed.shard.bytes  # less may be a connection that broke, unnoticed
            return wrong == _WRONG_CONTENTS

        try:
            remote.with_retries(placed.location, attempt, self.retries, final)
        except ValueError:  # says it all: a broken shard, a full disk, a package that is missing
            raise
        except Exception as error:
            found = f"{remote.describe(error)}, after {received} bytes"
            raise placed.error(f"{placed.shard.bytes} bytes", found, received, _ADVICE) from error

    def _write(self, descriptor: int, chunk: bytes, offset: int) -> None:
        written = 0
        try:
            while written < len(chunk):
                written += os.pwrite(descriptor, chunk[written:], offset + written)
        except OSError as error:
            raise self._folder.failed(error) from error

    def _close_idle(self, seconds: float) -> None:
        """Close what this process has not read for so long: its lock would keep others from making room."""
        before = time.monotonic() - seconds
        for sha256, held in list(self._held.items()):
            if held.used <= before and not held.pins:
                os.close(self._held.pop(sha256).descriptor)

    def _close_oldest(self) -> bool:
        """Close the least recently used copy that nobody reads; False when there is none."""
        for sha256, held in self._held.items():
            if not held.pins:
                os.close(self._held.pop(sha256).descriptor)
                return True
        return False

    def _start_thread(self) -> None:
        if self._thread is None:
            self._closing = threading.Event()
            self._thread = threading.Thread(
                target=self._run, args=(self._closing,), name="revpatch-shard-cache", daemon=True
            )
            self._thread.start()

    def _run(self, closing: threading.Event) -> None:
        while not closing.is_set():
            try:
                placed = self._queue.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    self._close_idle(IDLE_SECONDS)
                continue
            try:
                os.close(self._obtain(placed, in_background=True))
            except ShardError:  # stays among the wanted: it is not fetched again before someone reads it
                continue
            except Exception as error:
                _log.debug("%s: not fetched ahead: %s", placed.location, error)
            with self._lock:
                self._wanted.discard(placed.shard.sha256)
