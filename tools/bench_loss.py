"""The loss over the head alone: from hidden states to d(hidden), as the textbook has it, compiled, fused, and ours.

CE on new and replayed tokens and KL on the replayed, given last hidden states; the head is frozen. Of the fused
libraries, Liger's chunked distillation loss needs only torch and runs on a CPU (`pip install --no-deps liger-kernel`;
found to be right with 0.8.5). It is timed where it is installed; as the project doesn't need it, it is no requirement.
Liger's other losses and Cut Cross-Entropy are written in Triton, for GPUs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_oracle import CHECKED_WEIGHTS, LIMIT, PEERS_LIMIT, checked_workload, refuse_beyond
from bench_workload import KL_WEIGHT, REPLAY_WEIGHT, SHAPES, Workload
from torch import Tensor

from revpatch.step.head_loss import ChunkLoss, compiled, frozen_head_loss, in_place

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, float], Tensor]
"""(hidden, the teacher's, head, targets, new tokens, weight of replay, weight of KL) to the loss."""


class Loss:
    """One way of computing it, on random states."""

    def __init__(self, workload: Workload, function: LossFunction) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = SHAPES[workload.shape]
        tokens = (workload.new + workload.replay) * workload.block
        self.first = workload.new * workload.block
        there = (workload.device, workload.dtype)
        self.hidden = torch.randn(tokens, shape["n_embd"], generator=generator).to(*there).requires_grad_()
        self.teacher = torch.randn(tokens - self.first, shape["n_embd"], generator=generator).to(*there)
        self.head = (0.05 * torch.randn(shape["vocab_size"], shape["n_embd"], generator=generator)).to(*there)
        self.targets = torch.randint(shape["vocab_size"], (tokens,), generator=generator).to(workload.device)
        self.function = function
        self.weights = (REPLAY_WEIGHT, KL_WEIGHT)

    def step(self) -> tuple[Tensor, Tensor]:
        """The loss and d(loss)/d(hidden)."""
        loss = self.function(self.hidden, self.teacher, self.head, self.targets, self.first, *self.weights)
        (gradient,) = torch.autograd.grad(loss, self.hidden)
        return loss.detach(), gradient


def textbook(
    hidden: Tensor, teacher: Tensor, head: Tensor, targets: Tensor, first: int, replay_weight: float, kl_weight: float
) -> Tensor:
    """All logits at once, F.cross_entropy and F.kl_div."""
    logits, target = (hidden @ head.T).float(), (teacher @ head.T).float()
    new, replay = logits[:first], logits[first:]
    kl = F.kl_div(replay.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    replayed = F.cross_entropy(replay, targets[first:])
    return F.cross_entropy(new, targets[:first]) + replay_weight * replayed + kl_weight * kl


def ours(chunk: ChunkLoss) -> LossFunction:
    """As the objective calls it, with chunks done in one way or the other."""

    def loss(
        hidden: Tensor,
        teacher: Tensor,
        head: Tensor,
        targets: Tensor,
        first: int,
        replay_weight: float,
        kl_weight: float,
    ) -> Tensor:
        new, *_ = frozen_head_loss(hidden[:first], targets[:first], head, chunk=chunk)
        states, ids = hidden[first:], targets[first:]
        replay, *_ = frozen_head_loss(states, ids, head, teacher, replay_weight, kl_weight, chunk=chunk)
        return new + replay

    return loss


def liger(
    hidden: Tensor, teacher: Tensor, head: Tensor, targets: Tensor, first: int, replay_weight: float, kl_weight: float
) -> Tensor:
    """Liger's chunks for CE and KL on replay (its generalised JSD with beta 0 is KL(teacher ‖ student)), with what it
    takes by default: compiled, 1024 tokens. The new tokens have no teacher, and the textbook's CE."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(weight_hard_loss=replay_weight, weight_soft_loss=kl_weight, beta=0.0)
    replay: Tensor = fused(hidden[first:], head, teacher, head, targets[first:])
    return F.cross_entropy((hidden[:first] @ head.T).float(), targets[:first]) + replay


def exact(loss: Loss) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in float64, over tokens that are few enough."""
    hidden = loss.hidden.detach().double().requires_grad_()
    replay_weight, kl_weight = loss.weights
    q = (hidden @ loss.head.double().T).log_softmax(-1)
    nll = -q.gather(-1, loss.targets[:, None]).squeeze(-1)
    p = (loss.teacher.double() @ loss.head.double().T).log_softmax(-1)
    kl = (p.exp() * (p - q[loss.first :])).sum(-1).mean()
    value = nll[: loss.first].mean() + replay_weight * nll[loss.first :].mean() + kl_weight * kl
    (gradient,) = torch.autograd.grad(value, hidden)
    return value.detach(), gradient


LOSSES: dict[str, Callable[[Workload], Loss]] = {
    "ours": lambda workload: Loss(workload, ours(in_place)),
    "ours, compiled": lambda workload: Loss(workload, ours(compiled())),
    "textbook": lambda workload: Loss(workload, textbook),
    "textbook, compiled": lambda workload: Loss(workload, torch.compile(textbook, dynamic=False)),
}
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
if HAS_LIGER:
    LOSSES["Liger"] = lambda workload: Loss(workload, liger)


def check_losses(workload: Workload) -> dict[str, float]:
    """Relative gradient errors against float64, on a short workload; one beyond its limit ends the benchmark."""
    short = checked_workload(workload)
    found = {}
    for name, make in LOSSES.items():
        small = make(short)
        small.weights = CHECKED_WEIGHTS
        right_loss, right = exact(small)
        loss, gradient = small.step()
        wrong_loss = float((loss.double() - right_loss).abs() / right_loss.abs())
        found[name] = float((gradient.double() - right).norm() / right.norm())
        limit = (LIMIT if name.startswith("ours") else PEERS_LIMIT)[workload.dtype]
        refuse_beyond(limit, f"the loss alone, {name}", wrong_loss, found[name], workload.dtype)
    torch._dynamo.reset()  # what is timed is compiled for its own shape and weights
    return found
