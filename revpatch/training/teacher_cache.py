"""What the teacher said of the replayed blocks, kept until the teacher changes.

The teacher of a phase never changes, and replay draws the same blocks again and again: a block's last hidden states are
d numbers a token, and the frozen head turns them back into logits. They are kept in CPU memory (pinned for a GPU, so
that copies in both directions run beside the computation) up to a byte budget; the others are computed anew each time.

Which blocks are kept is known before any is computed. Every set has the same share of the draws, so a block of a small
set comes again sooner: the sets are let in whole, the smallest first, and of the first one that has no room a share of
its blocks, by a hash of their ids. So what is kept comes again, and whether a block is let in depends on the block, the
sets and the budget alone, not on what was drawn before: a run that goes on with an empty cache decides as it did.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from revpatch.stream.permutation import hash64

States = tuple[Tensor, ...]
"""What is kept of one block: any tensors, on the teacher's device."""
Key = tuple[Hashable, int]
"""A block: its set, and its number in it."""
_HASHES = 2**64


@dataclass
class TeacherCache:
    """States by a block's key.

    Args:
        budget: bytes of memory.
    """

    budget: int
    hits: int = 0
    """Blocks that were found, since the last `take_rate`."""
    misses: int = 0
    _sets: dict[Hashable, int] = field(default_factory=dict)
    _kept: dict[Key, States] = field(default_factory=dict)
    _bytes: int = 0

    def expect(self, sets: Mapping[Any, int]) -> None:
        """Blocks will be drawn from these sets, of so many blocks each; every set equally often."""
        self._sets = dict(sets)

    def admits(self, key: Key, size: int) -> bool:
        """Whether a block is to be kept, if the states of each take `size` bytes; blocks of sets that nobody has
        named are."""
        share = _shares(tuple(self._sets.items()), self.budget // size).get(key[0], 1.0)
        return share == 1.0 or int(hash64(key[1])) < share * _HASHES

    def get(self, key: Key, device: torch.device) -> States | None:
        """The states of a block on `device`, bit for bit as they were put; None if they are not kept."""
        kept = self._kept.get(key)
        self.hits += kept is not None
        self.misses += kept is None
        return None if kept is None else tuple(tensor.to(device, non_blocking=True) for tensor in kept)

    def put(self, key: Key, states: Sequence[Tensor]) -> None:
        """Keep a copy of a block's states where there is room."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in states)
        if self._bytes + size <= self.budget:
            self._kept[key] = tuple(_to_host(tensor) for tensor in states)
            self._bytes += size

    def clear(self) -> None:
        """Forgets everything: the teacher is another."""
        self._kept.clear()
        self._bytes = 0

    def take_rate(self) -> float | None:
        """The share of blocks that were found since the last call; None if none was asked for."""
        asked = self.hits + self.misses
        rate = self.hits / asked if asked else None
        self.hits = self.misses = 0
        return rate

    def __len__(self) -> int:
        return len(self._kept)


@functools.lru_cache(maxsize=16)
def _shares(sets: tuple[tuple[Hashable, int], ...], room: int) -> dict[Hashable, float]:
    """Of each set, the share of its blocks that is let in where there is room for so many blocks."""
    shares = {}
    for name, blocks in sorted(sets, key=lambda item: (item[1], str(item[0]))):
        shares[name] = min(1.0, room / blocks)
        room = max(0, room - blocks)
    return shares


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in CPU memory; of a GPU's tensor in pinned memory, made without waiting. A later copy back to that GPU is
    queued behind it."""
    on_gpu = tensor.device.type == "cuda"
    return torch.empty_like(tensor, device="cpu", pin_memory=on_gpu).copy_(tensor, non_blocking=on_gpu)
