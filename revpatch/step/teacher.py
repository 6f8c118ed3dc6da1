"""The teacher: the last committed patch on the same frozen base; on what the base knew, the base itself.

It is no copy of the model: the base's blocks run with other sidecars, or with none. Blocks of `replay.base` are always
answered for by the base: to be held to a commit, which has drifted on that text, would add each phase's drift to the
next one's. Its hidden states of replayed blocks are kept in CPU memory up to a byte budget: the smallest sets first,
and of the first set without room a share of its blocks, by a hash. Whether a block is kept depends on the block, the
sets and the budget alone, and each is computed by itself, so a resumed run with an empty cache ends with the same bits.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revpatch.patch.families import blocks_of, head_of, width_of
from revpatch.patch.patched_model import Patch, active_patch, recording
from revpatch.shards.mixture import hash64
from revpatch.step.frozen_base import LayerRecorder, last_hidden_states

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
        """Return whether a block is to be kept, if the states of each take `size` bytes; blocks of sets that nobody has
        named are."""
        share = _shares(tuple(self._sets.items()), self.budget // size).get(key[0], 1.0)
        return share == 1.0 or int(hash64(key[1])) < share * _HASHES

    def get(self, key: Key, device: torch.device) -> States | None:
        """Return the states of a block on `device`, bit for bit as they were put; None if they are not kept."""
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
        """Return the share of blocks that were found since the last call; None if none was asked for."""
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
    """Return a copy in CPU memory; of a GPU's tensor in pinned memory, made without waiting. A later copy back to that
    GPU is queued behind it."""
    on_gpu = tensor.device.type == "cuda"
    return torch.empty_like(tensor, device="cpu", pin_memory=on_gpu).copy_(tensor, non_blocking=on_gpu)


class TeacherOutput(NamedTuple):
    """What the student is held to on replayed blocks."""

    hidden: Tensor
    """(rows, time, d): the last hidden states, after the final norm."""
    stats: list[Tensor]
    """Per layer (2, rows, d): mean and deviation over time; empty unless asked for."""


class Teacher:
    """Runs the committed patch without gradients.

    Args:
        base: the patched base model.
        cache: keeps what it says; None computes it anew each time, all rows of one answer in one batch.
        base_set: the set, as in a block's key, whose blocks the unpatched base answers for.
    """

    def __init__(self, base: nn.Module, cache: TeacherCache | None = None, base_set: Hashable | None = None) -> None:
        self.base, self.cache, self.base_set = base, cache, base_set
        self.patch: Patch | None = None

    def follow(self, patch: Patch) -> None:
        """Makes a copy of the patch, as it is now, the teacher; called at each commit."""
        self.patch = copy.deepcopy(patch).requires_grad_(False)
        self.forget()

    def expect(self, sets: Mapping[Any, int]) -> None:
        """It will be asked about blocks of these sets, of so many blocks each; see `TeacherCache.expect`."""
        if self.cache is not None:
            self.cache.expect(sets)

    def forget(self) -> None:
        """Empties the cache."""
        if self.cache is not None:
            self.cache.clear()

    @torch.no_grad()
    def hidden(self, tokens: Tensor, keep_stats: bool = False, keys: Sequence[Key] | None = None) -> TeacherOutput:
        """Return the teacher's states.

        Args:
            tokens: (rows, time) int64.
            keep_stats: statistics of every layer too.
            keys: one a row, the same for the same tokens alone: a set, and a block in it. None goes past the cache.
        """
        if keys is None:
            return self._run(tokens, keep_stats, self.patch)
        assert len(keys) == len(tokens)
        size = self._size(tokens.shape[1], keep_stats)
        rows, cache = tokens.split(1), self.cache
        rest = [row for row, key in enumerate(keys) if cache is None or not cache.admits(key, size)]
        said: dict[int, States] = {}
        for patch in dict.fromkeys(self._patch_for(keys[row]) for row in rest):
            asked = [row for row in rest if self._patch_for(keys[row]) is patch]
            together = self._run(torch.cat([rows[row] for row in asked]), keep_stats, patch)
            parts = [together.hidden.split(1), *(layer.split(1, dim=1) for layer in together.stats)]
            said |= dict(zip(asked, zip(*parts, strict=True), strict=True))
        if cache is not None:
            cache.misses += len(rest)
            for row, key in enumerate(keys):
                if row not in said:
                    said[row] = self._kept(cache, key, rows[row], keep_stats)
        hidden, *stats = zip(*(said[row] for row in range(len(keys))), strict=True)
        return TeacherOutput(torch.cat(hidden), [torch.cat(layer, dim=1) for layer in stats])

    def _kept(self, cache: TeacherCache, key: Key, row: Tensor, keep_stats: bool) -> States:
        """Return what is kept of a block (1, time), or is from now on."""
        kept = cache.get(key, row.device)
        if kept is None:
            said = self._run(row, keep_stats, self._patch_for(key))
            kept = (said.hidden, *said.stats)
            cache.put(key, kept)
        return kept

    def _patch_for(self, key: Key) -> Patch | None:
        """Return the patch that answers for a block; None is the base alone."""
        return None if self.base_set is not None and key[0] == self.base_set else self.patch

    def _size(self, time: int, keep_stats: bool) -> int:
        """Return bytes of what is kept of a block."""
        width, dtype = width_of(self.base), head_of(self.base).weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        stats = 2 * len(blocks_of(self.base)) if keep_stats else 0
        return width * (time * dtype.itemsize + stats * wide.itemsize)

    def _run(self, tokens: Tensor, keep_stats: bool, patch: Patch | None) -> TeacherOutput:
        with active_patch(self.base, patch):
            if not keep_stats:
                return TeacherOutput(last_hidden_states(self.base, tokens), [])
            recorder = LayerRecorder(stats_from=0)
            with recording(self.base, recorder):
                return TeacherOutput(last_hidden_states(self.base, tokens), recorder.stats)
