"""The teacher: the last committed patch on the same frozen base.

It is not a copy of the model: the base's blocks run with other sidecars. Before the first commit it is the base alone,
or the patch that a restored run began with.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revpatch.patch.families import body_of
from revpatch.patch.patched_model import Patch, active_patch, recording
from revpatch.training.recorder import LayerRecorder


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
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.patch: Patch | None = None

    def follow(self, patch: Patch) -> None:
        """Makes a copy of the patch, as it is now, the teacher; called at each commit."""
        self.patch = copy.deepcopy(patch).requires_grad_(False)

    @torch.no_grad()
    def hidden(self, tokens: Tensor, keep_stats: bool = False) -> TeacherOutput:
        """The teacher's states on (rows, time) token ids."""
        recorder = LayerRecorder(stats_from=0)
        with active_patch(self.base, self.patch):
            if not keep_stats:
                return TeacherOutput(self._run(tokens), [])
            with recording(self.base, recorder):
                return TeacherOutput(self._run(tokens), recorder.stats)

    def _run(self, tokens: Tensor) -> Tensor:
        states: Tensor = body_of(self.base)(tokens, use_cache=False).last_hidden_state
        return states
