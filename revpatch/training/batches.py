"""The batches of one phase on one rank: which blocks, in which micro-batches; read ahead by one thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from revpatch.config import BatchConfig
from revpatch.stream.lanes import Lanes
from revpatch.stream.prefetch import Prefetcher
from revpatch.stream.replay import ReplayMixture, bottom_k
from revpatch.stream.shard_set import ShardSet
from revpatch.training.engine import MicroBatch
from revpatch.training.launch import Peers


class Batches:
    """Reads this rank's part of every global batch of a phase.

    Args:
        shards: the phase's blocks.
        lanes: their order.
        replay: the rehearsed blocks, or None.
        batch: sizes.
        peers: which part is this rank's.
        first_step: optimizer steps of the phases before this one; replay counts on from there.
    """

    def __init__(
        self,
        shards: ShardSet,
        lanes: Lanes,
        replay: ReplayMixture | None,
        batch: BatchConfig,
        peers: Peers,
        first_step: int,
    ) -> None:
        self.shards, self.lanes, self.replay = shards, lanes, replay
        self.device, self.first_step = peers.device, first_step
        self.accumulation = batch.accumulation(peers.world)
        self._new = _part(batch.new_blocks, peers)
        self._replayed = _part(batch.replay_blocks, peers)

    def stream(self, steps: int) -> Prefetcher[list[MicroBatch]]:
        """The micro-batches of steps 1 to `steps`, in CPU memory (pinned for a GPU); a context manager."""
        return Prefetcher(self._read, range(1, steps + 1))

    def to_device(self, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Moves them to this rank's device without waiting."""
        for new, replay in micro_batches:
            moved = None if replay is None else replay.to(self.device, non_blocking=True)
            yield new.to(self.device, non_blocking=True), moved

    def sample(self, seed: int, steps: Iterable[int], k: int) -> NDArray[np.int64]:
        """The bottom-k sample of all blocks trained on in these steps: block ids, the same on every rank."""
        ids = [self.lanes.block_ids(step - 1) for step in steps]
        return bottom_k(seed, np.concatenate(ids), k)

    def _read(self, step: int) -> list[MicroBatch]:
        new = self._tensor(self.shards.read(self.lanes.block_ids(step - 1, *self._new)))
        parts = new.chunk(self.accumulation)
        if self.replay is None:
            return [(part, None) for part in parts]
        tokens, _ = self.replay.read(self.first_step + step - 1, *self._replayed)
        return list(zip(parts, self._tensor(tokens).chunk(self.accumulation), strict=True))

    def _tensor(self, tokens: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(tokens)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def _part(blocks: int, peers: Peers) -> tuple[int, int]:
    share = blocks // peers.world
    return peers.rank * share, (peers.rank + 1) * share
