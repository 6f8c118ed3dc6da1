"""The loss over the head alone: from hidden states to d(hidden), as the textbook has it, compiled, and ours.

Fused libraries (Liger, Cut Cross-Entropy) are written in Triton for GPUs; none of them runs on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_workload import KL_WEIGHT, SHAPES, Workload
from torch import Tensor

from revpatch.training.head_loss import frozen_head_loss


class Loss:
    """CE on new and replayed tokens and KL on the replayed, given last hidden states; the head is frozen."""

    def __init__(self, workload: Workload, function: Callable[..., Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = SHAPES[workload.shape]
        tokens = (workload.new + workload.replay) * workload.block
        self.first = workload.new * workload.block
        dtype = workload.dtype
        self.hidden = torch.randn(tokens, shape["n_embd"], generator=generator).to(dtype).requires_grad_()
        self.teacher = torch.randn(tokens - self.first, shape["n_embd"], generator=generator).to(dtype)
        self.head = (0.05 * torch.randn(shape["vocab_size"], shape["n_embd"], generator=generator)).to(dtype)
        self.targets = torch.randint(shape["vocab_size"], (tokens,), generator=generator)
        self.function = function

    def step(self) -> Tensor:
        """d(loss)/d(hidden)."""
        loss = self.function(self.hidden, self.teacher, self.head, self.targets, self.first)
        (gradient,) = torch.autograd.grad(loss, self.hidden)
        return gradient


def textbook(hidden: Tensor, teacher: Tensor, head: Tensor, targets: Tensor, first: int) -> Tensor:
    """All logits at once, F.cross_entropy and F.kl_div."""
    logits, target = (hidden @ head.T).float(), (teacher @ head.T).float()
    new, replay = logits[:first], logits[first:]
    kl = F.kl_div(replay.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    return F.cross_entropy(new, targets[:first]) + F.cross_entropy(replay, targets[first:]) + KL_WEIGHT * kl


def ours(hidden: Tensor, teacher: Tensor, head: Tensor, targets: Tensor, first: int) -> Tensor:
    """As the objective calls it."""
    loss, *_ = frozen_head_loss(hidden[:first], targets[:first], head)
    replay, *_ = frozen_head_loss(hidden[first:], targets[first:], head, teacher=teacher, kl_weight=KL_WEIGHT)
    return loss + replay


def exact(loss: Loss) -> Tensor:
    """The textbook's gradient in float64, over tokens that are few enough."""
    hidden = loss.hidden.detach().double().requires_grad_()
    value = _wide_textbook(hidden, loss.teacher.double(), loss.head.double(), loss.targets, loss.first)
    (gradient,) = torch.autograd.grad(value, hidden)
    return gradient


def _wide_textbook(hidden: Tensor, teacher: Tensor, head: Tensor, targets: Tensor, first: int) -> Tensor:
    q = (hidden @ head.T).log_softmax(-1)
    nll = -q.gather(-1, targets[:, None]).squeeze(-1)
    p = (teacher @ head.T).log_softmax(-1)
    kl = (p.exp() * (p - q[first:])).sum(-1).mean()
    return nll[:first].mean() + nll[first:].mean() + KL_WEIGHT * kl


LOSSES: dict[str, Callable[[Workload], Loss]] = {
    "ours": lambda workload: Loss(workload, ours),
    "textbook": lambda workload: Loss(workload, textbook),
    "textbook, compiled": lambda workload: Loss(workload, torch.compile(textbook)),
}


def loss_errors(losses: dict[str, Loss], workload: Workload, limit: float) -> dict[str, float]:
    """Relative gradient errors against float64, on a short workload; ours beyond the limit ends the benchmark."""
    short = Workload(workload.shape, 1, 1, min(64, workload.block), workload.dtype)
    found = {}
    for name in losses:
        small = LOSSES[name](short)
        truth = exact(small)
        found[name] = float((small.step().double() - truth).norm() / truth.norm())
    if not found["ours"] < limit:
        sys.exit(f"the loss alone: gradient off by {found['ours']:.2g}, at most {limit:g} is right: no times are given")
    return found
