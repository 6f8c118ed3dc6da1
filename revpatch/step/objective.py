"""The objective of one micro-batch.

    L = LM(new) + replay_loss_weight·LM(replay) + distill_kl_weight·T²·KL(teacher ‖ student on replay)
        + gate_l1_weight·mean g + patch_l2_weight·mean ‖h − u‖² + scale_l2_weight·mean (log s − log s₀)²
        + stats_drift_weight·mean over layers of (‖μ − μ*‖² + ‖σ − σ*‖²)/d on replay, a sequence at a time

New and replayed blocks go through the student in one batch; the teacher (the last committed patch on the same base)
sees the replayed ones. `PatchObjective` is the module that is handed to the engine: only the sidecars are its
parameters, the frozen base hangs beside them, unregistered, so that no engine broadcasts, flattens or saves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revpatch.config import ObjectiveConfig
from revpatch.patch.families import head_of
from revpatch.patch.patched_model import Patch, recording
from revpatch.step.frozen_base import LayerRecorder, last_hidden_states, stats_drift
from revpatch.step.head_loss import ChunkLoss, frozen_head_loss, in_place
from revpatch.step.teacher import Key, Teacher

TERMS = ("loss", "lm", "replay_lm", "distill_kl", "gate_l1", "patch_l2", "scale_l2", "stats_drift")
"""The logged terms, unweighted but for `loss`, the weighted sum. Those that need the teacher are 0 where their weight
is: it isn't asked then."""


class StepOutput(NamedTuple):
    """What a micro-batch gives; the last two are detached."""

    loss: Tensor
    """()"""
    terms: Tensor
    """(len(TERMS),) float32"""
    layers: Tensor
    """(2, layers) float32: mean gate, and root mean square of h − u, of each layer"""


class PatchObjective(nn.Module):
    """The student, the teacher and the loss.

    Args:
        base: the patched base model, frozen and in eval mode.
        patch: the sidecars that learn, active on `base`.
        teacher: gives the last hidden states of the last committed patch.
        config: weights of the terms.
        chunk: how the loss over the head is done; see `frozen_head_loss`.
    """

    def __init__(
        self, base: nn.Module, patch: Patch, teacher: Teacher, config: ObjectiveConfig, chunk: ChunkLoss = in_place
    ) -> None:
        super().__init__()
        self.patch = patch
        self.chunk = chunk
        self._frozen = (base, teacher)  # in a tuple: not registered
        self.config = config
        self.initial_log_scale = math.log(patch.config.init_scale)

    def forward(self, new: Tensor, replay: Tensor | None = None, keys: Sequence[Key] | None = None) -> StepOutput:
        """Return the objective.

        Args:
            new: (n, time) int64 token ids.
            replay: (r, time) int64, or None when nothing is replayed.
            keys: of the replayed blocks, as `Teacher.hidden` takes them.
        """
        base, teacher = self._frozen
        config, count = self.config, len(new)
        tokens = new if replay is None else torch.cat([new, replay])
        student = LayerRecorder(
            count if config.stats_drift_weight and replay is not None else None,
            gate_learns=bool(config.gate_l1_weight),
            change_learns=bool(config.patch_l2_weight),
        )
        with recording(base, student):
            hidden = last_hidden_states(base, tokens)
        head = head_of(base).weight
        loss, lm, _ = frozen_head_loss(*_shifted(hidden[:count], new), head, chunk=self.chunk)
        zero = torch.zeros_like(lm)
        replay_lm = kl = drift = zero
        if replay is not None:
            states, ids = _shifted(hidden[count:], replay)
            distils, taught = bool(config.distill_kl_weight), None
            if distils or config.stats_drift_weight:
                target = teacher.hidden(replay, bool(config.stats_drift_weight), keys)
                taught = target.hidden[:, :-1].reshape(states.shape) if distils else None
            replay_loss, replay_lm, kl = frozen_head_loss(
                states,
                ids,
                head,
                teacher=taught,
                ce_weight=config.replay_loss_weight,
                kl_weight=config.distill_kl_weight,
                temperature=config.distill_temperature,
                chunk=self.chunk,
            )
            loss = loss + replay_loss
            if config.stats_drift_weight:
                drift = stats_drift(student.stats, target.stats)
        gate, change = student.gate_mean(), student.change_mean()
        scale_l2 = (self.patch.log_scales() - self.initial_log_scale).square().mean()
        penalties = (gate.mean(), change.mean(), scale_l2, drift)
        weights = (config.gate_l1_weight, config.patch_l2_weight, config.scale_l2_weight, config.stats_drift_weight)
        for weight, penalty in zip(weights, penalties, strict=True):
            if weight:
                loss = loss + weight * penalty
        terms = torch.stack([term.detach().float() for term in (loss, lm, replay_lm, kl, *penalties)])
        layers = torch.stack([gate.detach().float(), change.detach().float().sqrt()])
        return StepOutput(loss, terms, layers)


def _shifted(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """States (rows·(time − 1), d) and the tokens they predict, within each block."""
    return hidden[:, :-1].reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
