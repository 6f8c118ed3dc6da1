"""The teacher: the last committed patch on the same frozen base; on what the base knew, the base itself.

It is no copy of the model: the base's blocks run with other sidecars, or with none. Before the first commit it is the
base alone, or the patch that a restored run began with. Blocks of `replay.base` are always answered for by the base: a
commit has drifted from it on that text, and to be held to the commit would add each phase's drift to the next one's.

With a cache, what it says of a block that is to be kept is computed once, by itself: the last bits of a matrix product
depend on how many rows it has, and what is remembered must not depend on which other blocks were asked for beside it.
The blocks that are not to be kept are computed in one batch. Which they are does not depend on what the cache holds, so
a run that was stopped and goes on with an empty cache ends with the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
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
        """The teacher's states.

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
        """What is kept of a block (1, time), or is from now on."""
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
        """Bytes of what is kept of a block."""
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
