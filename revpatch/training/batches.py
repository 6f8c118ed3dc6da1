"""The batches of one phase on one rank: which blocks, in which micro-batches; read ahead by one thread.

In each step the reading threads of all ranks meet, ahead of the training and beside it: what one of them has met (a
shard that is broken, a signal to stop) all of them know before any trains on that step, so that all do the same.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from revpatch.config import BatchConfig
from revpatch.stream.corpus import Corpus
from revpatch.stream.mixture import Mixture
from revpatch.stream.prefetch import Prefetcher
from revpatch.stream.quarantine import Broken, Quarantine
from revpatch.stream.replay import ReplayMixture, bottom_k
from revpatch.stream.tars import ShardError
from revpatch.training.engine import MicroBatch
from revpatch.training.launch import Peers

LOOK_AHEAD_STEPS = 64
"""Shards that lie elsewhere are fetched so many steps before their first block is needed."""


@dataclass(frozen=True)
class Failure:
    """What kept a rank from its batch; of a broken shard, which one of which set, and where it lies."""

    what: str
    digest: str = ""
    shard: int = -1
    where: str = ""

    @classmethod
    def of(cls, error: Exception, rank: int) -> Failure:
        """From what reading raised."""
        what = f"rank {rank} on {socket.gethostname()}: {error}"
        if not isinstance(error, ShardError):
            return cls(what)
        return cls(what, error.digest, error.shard, error.location)


@dataclass
class Ready:
    """What a step trains on, the same decision on all ranks."""

    step: int
    micro_batches: list[MicroBatch] = field(default_factory=list)
    quarantined: list[Broken] = field(default_factory=list)
    """Shards that were taken out for this step and the ones after it."""
    interrupted: bool = False
    """A rank was told to stop: this step is not trained."""
    failure: Failure | None = None
    """What kept this rank from its batches, while the ranks have not agreed yet."""


class Batches:
    """Reads this rank's part of every global batch of a phase.

    Args:
        corpus: the phase's blocks.
        mixture: their order.
        replay: the rehearsed blocks, or None.
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
        peers: Peers,
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
        rehearsed = () if replay is None else replay.sets
        remote = not all(shards.is_local for shards in (*corpus.sets, *rehearsed))
        self._ahead = copy.deepcopy(mixture) if remote else None  # with a memory of its own of where it is

    def stream(self, steps: int, done: int = 0) -> Prefetcher[Ready]:
        """What steps `done` + 1 to `steps` train on, in CPU memory (pinned for a GPU); a context manager.

        Raises ShardError, on all ranks at the same step, for a shard that is broken, if that stops the run; ValueError
        likewise for what else kept a rank from reading.
        """
        self._wanted, self._last = done, steps
        return Prefetcher(self._fetch, range(done + 1, steps + 1), depth=1, settle=self._settle)

    def to_device(self, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Moves them to this rank's device without waiting."""
        for new, replay, keys in micro_batches:
            moved = None if replay is None else replay.to(self.peers.device, non_blocking=True)
            yield MicroBatch(new.to(self.peers.device, non_blocking=True), moved, keys)

    def sample(self, seed: int, steps: Iterable[int], k: int) -> NDArray[np.int64]:
        """The bottom-k sample of all blocks trained on in these steps that can be read still: the same on every
        rank."""
        ids = np.concatenate([self._ids(step, 0, self.mixture.lanes) for step in steps])
        if self.quarantine.broken:
            for shards, rows, numbers in self.corpus.locate(ids):
                ids[rows[~self.quarantine.sound(shards.manifest, numbers)]] = -1
            ids = ids[ids >= 0]
        return bottom_k(seed, ids, k)

    def _fetch(self, step: int) -> Ready:
        """This rank's part of a step."""
        ready = Ready(step)
        try:
            if self._ahead is not None:
                self._look_ahead(step, self._ahead)
            ready.micro_batches = self._read(step)
        except (ValueError, OSError) as error:  # a broken shard, a cache without room, a disk that fails
            ready.failure = Failure.of(error, self.peers.rank)
        return ready

    def _settle(self, step: int, ready: Ready) -> Ready:
        """The same once all ranks have theirs, or have agreed on what to do about those that have not."""
        while True:
            failures, ready.interrupted = self.peers.agree(ready.failure, self.interrupted())
            if ready.interrupted or not failures:
                return ready
            if self.on_error == "stop" or not all(failure.digest for failure in failures):
                raise stopping(failures)
            new = [broken for broken in map(self.broken, failures, repeat(step)) if self.quarantine.add(broken)]
            if not new:  # what is out already can't be what is missing: no shard is left to read instead
                raise stopping(failures)
            ready.quarantined += new
            again = self._fetch(step)
            ready.micro_batches, ready.failure = again.micro_batches, again.failure

    def broken(self, failure: Failure, step: int) -> Broken:
        """The failure as a shard that is out from this step of the phase on."""
        since = self.first_step + step - 1
        return Broken(failure.digest, failure.shard, since, failure.where, failure.what)

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
        """The new blocks of some lanes at a step of the phase."""
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


def stopping(failures: list[Failure]) -> ValueError:
    """What every rank raises, so that all of them say why."""
    words = f"{'; '.join(failure.what for failure in failures)}. All ranks stop here"
    first = failures[0]
    if not all(failure.digest for failure in failures):
        return ValueError(words)
    words += ". To train on without such shards: --set stream.on_error=quarantine"
    return ShardError(words, location=first.where, shard=first.shard, digest=first.digest)


def _part(blocks: int, peers: Peers) -> tuple[int, int]:
    share = blocks // peers.world
    return peers.rank * share, (peers.rank + 1) * share
