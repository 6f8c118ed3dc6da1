"""What the teacher said of the replayed blocks, kept until the teacher changes.

The teacher of a phase never changes, and replay draws the same blocks again and again: a block's last hidden states are
d numbers a token, and the frozen head turns them back into logits. They are kept in CPU memory (pinned for a GPU, so
that copies in both directions run beside the computation) up to a byte budget and, if a folder is given, on disk beyond
it up to another.

Which blocks are kept is known before any is computed. Every set has the same share of the draws, so a block of a small
set comes again sooner: the sets are let in whole, the smallest first, and of the first one that has no room a share of
its blocks, by a hash of their ids. So what is kept comes again, and whether a block is let in depends on the block, the
sets and the budgets alone, not on what was drawn before: a run that goes on with an empty cache decides as it did.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
        spill: folder for what the memory has no room for; None keeps none on disk. A folder of its own is made in it,
            which goes with the cache or, at the latest, with the interpreter.
        spill_budget: bytes on disk.
    """

    budget: int
    spill: Path | None = None
    spill_budget: int = 0
    hits: int = 0
    """Blocks that were found, since the last `take_rate`."""
    misses: int = 0
    _sets: dict[Hashable, int] = field(default_factory=dict)
    _kept: dict[Key, States] = field(default_factory=dict)
    _spilt: dict[Key, Path] = field(default_factory=dict)
    _bytes: int = 0
    _spilt_bytes: int = 0
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def expect(self, sets: Mapping[Any, int]) -> None:
        """Blocks will be drawn from these sets, of so many blocks each; every set equally often."""
        self._sets = dict(sets)

    def admits(self, key: Key, size: int) -> bool:
        """Whether a block is to be kept, if the states of each take `size` bytes; blocks of sets that nobody has
        named are."""
        share = _shares(tuple(self._sets.items()), self._room() // size).get(key[0], 1.0)
        return share == 1.0 or int(hash64(key[1])) < share * _HASHES

    def get(self, key: Key, device: torch.device) -> States | None:
        """The states of a block on `device`, bit for bit as they were put; None if they are not kept."""
        if (kept := self._kept.get(key)) is None and (path := self._spilt.get(key)) is not None:
            kept = tuple(torch.load(path, weights_only=True))
        self.hits += kept is not None
        self.misses += kept is None
        return None if kept is None else tuple(tensor.to(device, non_blocking=True) for tensor in kept)

    def put(self, key: Key, states: Sequence[Tensor]) -> None:
        """Keeps a copy of a block's states where there is room.

        Raises OSError if the spill's folder can't be written to, or its disk is full.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in states)
        if self._bytes + size <= self.budget:
            self._kept[key] = tuple(_to_host(tensor) for tensor in states)
            self._bytes += size
        elif self.spill is not None and self._spilt_bytes + size <= self.spill_budget:
            path = self._spill_folder() / str(len(self._spilt))
            try:
                torch.save([tensor.cpu().clone() for tensor in states], path)
            except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError when the disk is full
                path.unlink(missing_ok=True)
                raise _failed(path, error) from None
            self._spilt[key] = path
            self._spilt_bytes += size

    def clear(self) -> None:
        """Forgets everything: the teacher is another."""
        self._kept.clear()
        self._spilt.clear()
        self._bytes = self._spilt_bytes = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def take_rate(self) -> float | None:
        """The share of blocks that were found since the last call; None if none was asked for."""
        asked = self.hits + self.misses
        rate = self.hits / asked if asked else None
        self.hits = self.misses = 0
        return rate

    def __len__(self) -> int:
        return len(self._kept) + len(self._spilt)

    def _room(self) -> int:
        return self.budget + (self.spill_budget if self.spill is not None else 0)

    def _spill_folder(self) -> Path:
        if self._folder is None:
            assert self.spill is not None
            try:
                self.spill.mkdir(parents=True, exist_ok=True)
                made = tempfile.TemporaryDirectory(prefix="teacher-", dir=self.spill, ignore_cleanup_errors=True)
            except OSError as error:
                raise _failed(self.spill, error) from None
            self._folder = made
        return Path(self._folder.name)


def _failed(path: Path, error: Exception) -> OSError:
    return OSError(
        f"teacher.spill: {path} can't be written ({error}); make room, name another folder, or set it to null"
    )


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
