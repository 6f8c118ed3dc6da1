"""The teacher: the last committed patch on the same frozen base.

It is not a copy of the model: the base's blocks run with other sidecars. Before the first commit it is the base alone,
or the patch that a restored run began with.

With a cache, what it says of a block that is to be kept is computed once, by itself: the last bits of a matrix product
depend on how many rows it has, and what is remembered must not depend on which other blocks were asked for beside it.
The blocks that are not to be kept are computed in one batch. Which they are does not depend on what the cache holds, so
a run that was stopped and goes on with an empty cache ends with the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revpatch.patch.families import blocks_of, head_of, width_of
from revpatch.patch.patched_model import Patch, active_patch, recording
from revpatch.training.packed import last_hidden_states
from revpatch.training.recorder import LayerRecorder
from revpatch.training.teacher_cache import Key, States, TeacherCache


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
        cache: keeps what it says; None computes it anew each time, all rows in one batch.
    """

    def __init__(self, base: nn.Module, cache: TeacherCache | None = None) -> None:
        self.base = base
        self.cache = cache
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
        """The teacher's states.

        Args:
            tokens: (rows, time) int64.
            keep_stats: statistics of every layer too.
            keys: one a row, the same for the same tokens alone: a set, and a block in it. None goes past the cache.
        """
        if self.cache is None or keys is None:
            return self._run(tokens, keep_stats)
        assert len(keys) == len(tokens)
        size = self._size(tokens.shape[1], keep_stats)
        rows, rest = tokens.split(1), [row for row, key in enumerate(keys) if not self.cache.admits(key, size)]
        said: dict[int, States] = {}
        if rest:
            together = self._run(torch.cat([rows[row] for row in rest]), keep_stats)
            parts = [together.hidden.split(1), *(layer.split(1, dim=1) for layer in together.stats)]
            said = dict(zip(rest, zip(*parts, strict=True), strict=True))
            self.cache.misses += len(rest)
        for row, key in enumerate(keys):
            if row not in said:
                said[row] = self._kept(self.cache, key, rows[row], keep_stats)
        hidden, *stats = zip(*(said[row] for row in range(len(keys))), strict=True)
        return TeacherOutput(torch.cat(hidden), [torch.cat(layer, dim=1) for layer in stats])

    def _kept(self, cache: TeacherCache, key: Key, row: Tensor, keep_stats: bool) -> States:
        """What is kept of a block (1, time), or is from now on."""
        kept = cache.get(key, row.device)
        if kept is None:
            said = self._run(row, keep_stats)
            kept = (said.hidden, *said.stats)
            cache.put(key, kept)
        return kept

    def _size(self, time: int, keep_stats: bool) -> int:
        """Bytes of what is kept of a block."""
        width, dtype = width_of(self.base), head_of(self.base).weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        stats = 2 * len(blocks_of(self.base)) if keep_stats else 0
        return width * (time * dtype.itemsize + stats * wide.itemsize)

    def _run(self, tokens: Tensor, keep_stats: bool) -> TeacherOutput:
        with active_patch(self.base, self.patch):
            if not keep_stats:
                return TeacherOutput(last_hidden_states(self.base, tokens), [])
            recorder = LayerRecorder(stats_from=0)
            with recording(self.base, recorder):
                return TeacherOutput(last_hidden_states(self.base, tokens), recorder.stats)
