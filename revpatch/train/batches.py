"""The batches of one phase on one rank: which blocks, in which micro-batches; read ahead by one thread.

Before each step the ranks agree: what one of them has met (a broken shard, a signal to stop) all of them know before
any trains on that step, so all do the same.
"""

from __future__ import annotations

import copy
import queue
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from revpatch.config import BatchConfig
from revpatch.distributed.ranks import Ranks
from revpatch.shards.format import ShardError, ShardFault
from revpatch.shards.mixture import Mixture
from revpatch.shards.quarantine import Quarantine
from revpatch.shards.replay import ReplayMixture, bottom_k
from revpatch.shards.shard_set import Corpus
from revpatch.step.engine import MicroBatch

Item = TypeVar("Item")


@dataclass
class _Fetched(Generic[Item]):
    batch: Item


class Prefetcher(Iterator[Item], Generic[Item]):
    """`fetch(step)` for every step, in order, ahead of the caller.

    At most `depth` batches wait for the caller, and one more is fetched. What `fetch` or `steps` raises is raised by
    `next` at the very step it belongs to, after the batches before it; nothing is fetched after that. Close it, or use
    it as a context.
    """

    def __init__(self, fetch: Callable[[int], Item], steps: Iterable[int], depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}; at least 1 batch must fit")
        self._fetch = fetch
        self._steps = steps
        self._depth = depth
        self._room = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[_Fetched[Item] | BaseException] = queue.SimpleQueue()
        self._closing = threading.Event()
        self.waited = 0.0
        """Seconds that the caller has waited for batches in all."""
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="revpatch-prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Prefetcher[Item]:
        return self

    def __next__(self) -> Item:
        """Return the next batch. Raises StopIteration at the end of the steps and RuntimeError once closed."""
        if self._closing.is_set():
            raise RuntimeError("the prefetcher is closed; make a new one")
        if self._end is None:
            began = time.monotonic()
            ready = self._ready.get()
            self.waited += time.monotonic() - began
            if isinstance(ready, _Fetched):
                self._room.release()
                return ready.batch
            self._end = ready
        raise self._end  # again at every further call: an error must not turn into a quiet end

    def close(self) -> None:
        """Stop reading and wait for the thread. May be called again."""
        self._closing.set()
        self._room.release(self._depth + 1)  # the thread may be waiting for room
        self._thread.join()

    def _run(self) -> None:
        try:
            for step in self._steps:
                if self._closing.is_set():
                    return
                batch = self._fetch(step)
                self._room.acquire()
                self._ready.put(_Fetched(batch))
            self._ready.put(StopIteration())
        except BaseException as error:  # handed over: it belongs to the caller
            self._ready.put(error)


LOOK_AHEAD_STEPS = 64
"""Shards that lie elsewhere are fetched so many steps before their first block is needed."""


@dataclass
class Batch:
    """What a step trains on, the same decision on all ranks."""

    step: int
    micro_batches: list[MicroBatch] = field(default_factory=list)
    quarantined: list[ShardFault] = field(default_factory=list)
    """Shards that were taken out for this step and the ones after it."""
    interrupted: bool = False
    """A rank was told to stop: this step is not trained."""
    failure: ShardFault | str | None = None
    """What kept this rank from its batches, until the ranks have agreed."""


class Batches:
    """Reads this rank's part of every global batch of a phase.

    Args:
        corpus: the phase's blocks.
        mixture: their order.
        replay: the replayed blocks, or None.
        batch: sizes.
        peers: which part is this rank's.
        first_step: optimizer steps of the phases before this one; replay counts on from there.
        quarantine: shards that are out; with `on_error` "quarantine", those that break are added.
        interrupted: asks whether this process was told to stop.
    """

    def __init__(
        self,
        corpus: Corpus,
        mixture: Mixture,
        replay: ReplayMixture | None,
        batch: BatchConfig,
        peers: Ranks,
        first_step: int,
        quarantine: Quarantine,
        on_error: Literal["stop", "quarantine"] = "stop",
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.corpus, self.mixture, self.replay = corpus, mixture, replay
        self.peers, self.first_step = peers, first_step
        self.quarantine, self.on_error, self.interrupted = quarantine, on_error, interrupted
        self.accumulation = batch.accumulation(peers.world)
        self._new = _part(batch.new_blocks, peers)
        self._replayed = _part(batch.replay_blocks, peers)
        self._wanted = self._last = 0
        self.waited = 0.0
        """Seconds that this phase's steps have waited for data."""
        replayed = () if replay is None else replay.sets
        remote = not all(shards.is_local for shards in (*corpus.sets, *replayed))
        self._ahead = copy.deepcopy(mixture) if remote else None  # with a memory of its own of where it is

    def stream(self, steps: int, done: int = 0) -> Generator[Batch, None, None]:
        """Yield what steps `done` + 1 to `steps` train on, in CPU memory (pinned for a GPU); close it at the end.

        Raises ShardError, on all ranks at the same step, for a shard that is broken, if that stops the run; ValueError
        likewise for what else kept a rank from reading.
        """
        self._wanted, self._last, quarantined = done, steps, list[ShardFault]()
        while done < steps:
            failures: list[ShardFault | str] = []
            with Prefetcher(self._fetch, range(done + 1, steps + 1), depth=1) as fetched:
                for ready in fetched:
                    failures, ready.interrupted = self.peers.agree(ready.failure, self.interrupted())
                    self.waited, fetched.waited = self.waited + fetched.waited, 0.0
                    if failures and not ready.interrupted:
                        break  # what was read ahead is read again, without the shards that go
                    ready.quarantined, quarantined = quarantined, []
                    yield ready
                    done = ready.step
            if failures:
                quarantined += self._take_out(failures, done + 1)

    def to_device(self, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Moves them to this rank's device without waiting."""
        for new, replay, keys in micro_batches:
            moved = None if replay is None else replay.to(self.peers.device, non_blocking=True)
            yield MicroBatch(new.to(self.peers.device, non_blocking=True), moved, keys)

    def sample(self, seed: int, steps: Iterable[int], k: int) -> NDArray[np.int64]:
        """Return the bottom-k sample of all blocks trained on in these steps that can be read still: the same on every
        rank."""
        ids = np.concatenate([self._ids(step, 0, self.mixture.lanes) for step in steps])
        if self.quarantine.broken:
            for shards, rows, numbers in self.corpus.locate(ids):
                ids[rows[~self.quarantine.sound(shards.manifest, numbers)]] = -1
            ids = ids[ids >= 0]
        return bottom_k(seed, ids, k)

    def _fetch(self, step: int) -> Batch:
        """This rank's part of a step."""
        ready = Batch(step)
        try:
            if self._ahead is not None:
                self._look_ahead(step, self._ahead)
            ready.micro_batches = self._read(step)
        except (ValueError, OSError) as error:  # a broken shard, a cache without room, a disk that fails
            ready.failure = failure_of(error, self.peers.rank)
        return ready

    def _take_out(self, failures: list[ShardFault | str], step: int) -> list[ShardFault]:
        """Return the shards that are out from this step of the phase on, the same on every rank. Raises as `stream`."""
        faults = [failure for failure in failures if isinstance(failure, ShardFault)]
        if self.on_error == "stop" or len(faults) < len(failures):
            raise stopping(failures)
        new = [fault for fault in (self.out_from(each, step) for each in faults) if self.quarantine.add(fault)]
        if not new:  # what is out already can't be what is missing: no shard is left to read instead
            raise stopping(failures)
        return new

    def out_from(self, fault: ShardFault, step: int) -> ShardFault:
        """Return the fault of a shard that is out from this step of the phase on."""
        return replace(fault, since=self.first_step + step - 1)

    def _read(self, step: int) -> list[MicroBatch]:
        new = self._tensor(self.corpus.read(self._ids(step, *self._new)))
        parts = new.chunk(self.accumulation)
        if self.replay is None:
            return [MicroBatch(part) for part in parts]
        tokens, keys = self.replay.read(self.first_step + step - 1, *self._replayed, self.quarantine)
        replayed, each = self._tensor(tokens).chunk(self.accumulation), len(keys) // self.accumulation
        return [
            MicroBatch(new, again, keys[number * each : (number + 1) * each])
            for number, (new, again) in enumerate(zip(parts, replayed, strict=True))
        ]

    def _ids(self, step: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the new blocks of some lanes at a step of the phase."""
        ids = self.mixture.block_ids(step - 1, start, stop)
        return self.quarantine.replace_in(self.corpus, ids, self.first_step + step - 1, np.arange(start, stop))

    def _look_ahead(self, step: int, mixture: Mixture) -> None:
        """Asks for the shards of the steps to come."""
        until = min(step + LOOK_AHEAD_STEPS, self._last)
        for later in range(self._wanted + 1, until + 1):
            for shards, _, numbers in self.corpus.locate(mixture.block_ids(later - 1, *self._new)):
                shards.want(np.unique(shards.shards_of(numbers)).tolist())
            if self.replay is not None:
                self.replay.want(self.first_step + later - 1, *self._replayed)
        self._wanted = max(self._wanted, until)

    def _tensor(self, tokens: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(tokens)
        return tensor.pin_memory() if self.peers.device.type == "cuda" else tensor


def failure_of(error: Exception, rank: int) -> ShardFault | str:
    """Return what a rank tells the others of what reading raised."""
    what = f"rank {rank} on {socket.gethostname()}: {error}"
    fault = error.fault if isinstance(error, ShardError) else None
    return what if fault is None else replace(fault, reason=what)


def stopping(failures: Sequence[ShardFault | str]) -> ValueError:
    """Return what every rank raises, so that all of them say why."""
    whats = [failure if isinstance(failure, str) else failure.reason for failure in failures]
    words = f"{'; '.join(whats)}. All ranks stop here"
    first = failures[0]
    if not all(isinstance(failure, ShardFault) for failure in failures):
        return ValueError(words)
    assert isinstance(first, ShardFault)
    return ShardError(f"{words}. To train on without such shards: --set stream.on_error=quarantine", first)


def _part(blocks: int, peers: Ranks) -> tuple[int, int]:
    share = blocks // peers.world
    return peers.rank * share, (peers.rank + 1) * share
