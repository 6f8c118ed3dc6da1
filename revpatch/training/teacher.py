"""The teacher: the last committed patch on the same frozen base.

It is not a copy of the model: the base's blocks run with other sidecars. Before the first commit it is the base alone,
or the patch that a restored run began with.

With a cache, what it says of a block is computed once, one block at a time: the last bits of a matrix product depend on
how many rows it has, and what is remembered must not depend on which other blocks were asked for beside it. A run that
was stopped and goes on has an empty cache, and ends with the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revpatch.patch.patched_model import Patch, active_patch, recording
from revpatch.training.packed import last_hidden_states
from revpatch.training.recorder import LayerRecorder
from revpatch.training.teacher_cache import TeacherCache


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

    def forget(self) -> None:
        """Empties the cache."""
        if self.cache is not None:
            self.cache.clear()

    @torch.no_grad()
    def hidden(self, tokens: Tensor, keep_stats: bool = False, keys: Sequence[Hashable] | None = None) -> TeacherOutput:
        """The teacher's states.

        Args:
            tokens: (rows, time) int64.
            keep_stats: statistics of every layer too.
            keys: one a row, the same for the same tokens alone; None goes past the cache.
        """
        if self.cache is None or keys is None:
            return self._run(tokens, keep_stats)
        assert len(keys) == len(tokens)
        rows = []
        for key, row in zip(keys, tokens.split(1), strict=True):
            kept = self.cache.get(key, tokens.device)
            if kept is None:
                said = self._run(row, keep_stats)
                kept = (said.hidden, *said.stats)
                self.cache.put(key, kept)
            rows.append(kept)
        hidden, *stats = zip(*rows, strict=True)
        return TeacherOutput(torch.cat(hidden), [torch.cat(layer, dim=1) for layer in stats])

    def _run(self, tokens: Tensor, keep_stats: bool) -> TeacherOutput:
        with active_patch(self.base, self.patch):
            if not keep_stats:
                return TeacherOutput(last_hidden_states(self.base, tokens), [])
            recorder = LayerRecorder(stats_from=0)
            with recording(self.base, recorder):
                return TeacherOutput(last_hidden_states(self.base, tokens), recorder.stats)
