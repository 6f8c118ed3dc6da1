"""The objective in float64, written out, against which bench.py holds every peer before it is timed."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from bench_ours import Ours, Parts, Peer
from bench_workload import KL_WEIGHT, REPLAY_WEIGHT, SHAPES, Workload, name_of
from torch import Tensor

from revpatch.step.head_loss import MIN_ROWS

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative error of ours, of the loss and of the gradient."""
PEERS_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""The same of the others: a peer beyond it does other work than it says."""
CHECKED_BLOCKS, CHECKED_TOKENS = 2, MIN_ROWS + 32
"""New blocks, as many replayed, and tokens of each: one alone has more rows than a chunk of the loss over GPT-2's head,
which the step of a micro-batch of one goes through too."""
CHECKED_WEIGHTS = (0.7, 1.3)
"""Of replay and KL: with equal ones, two terms in one another's place would go unseen."""


def checked_workload(workload: Workload) -> Workload:
    """The step that is checked in its place."""
    block = min(CHECKED_TOKENS, SHAPES[workload.shape]["n_positions"])
    return replace(workload, new=CHECKED_BLOCKS, replay=CHECKED_BLOCKS, block=block)


def check(name: str, peer: Peer) -> float:
    """The relative gradient error; ends the benchmark if that, or the loss's, is too large."""
    wrong = errors(peer)
    refuse_beyond((LIMIT if isinstance(peer, Ours) else PEERS_LIMIT)[peer.dtype], name, *wrong, peer.dtype)
    return wrong[1]


def refuse_beyond(limit: float, name: str, wrong_loss: float, wrong_gradient: float, dtype: torch.dtype) -> None:
    """Ends the benchmark if one of the errors is not below the limit."""
    if not (wrong_loss < limit and wrong_gradient < limit):
        sys.exit(
            f"{name}: loss off by {wrong_loss:.2g}, gradient by {wrong_gradient:.2g} of the float64 objective's; less "
            f"than {limit:g} is right in {name_of(dtype)}. No times are given for a wrong step."
        )


def errors(peer: Peer) -> tuple[float, float]:
    """Relative errors of the peer's loss and of its gradient, over all that it trains as one vector.

    The larger of two calls: what the first one keeps, as the teacher's cache does, the second one takes.
    """
    new, replay = checked_workload(peer.workload).tokens()
    parts = peer.parts()
    expected = oracle(parts, new, replay, *CHECKED_WEIGHTS)
    truth = torch.autograd.grad(expected, parts.student.parameters)  # type: ignore[attr-defined]
    peer.weigh(*CHECKED_WEIGHTS)
    found = [_error(peer, new, replay, expected.item(), truth) for _ in range(2)]
    peer.weigh(REPLAY_WEIGHT, KL_WEIGHT)
    loss, gradient = torch.tensor(found, dtype=torch.float64).amax(0).tolist()  # of which a NaN is one
    return loss, gradient


def _error(peer: Peer, new: Tensor, replay: Tensor, expected: float, truth: tuple[Tensor, ...]) -> tuple[float, float]:
    peer.optimizer.zero_grad()
    loss = float(peer.backward(new, replay))
    wrong = right = 0.0
    for parameter, gradient in zip(peer.trainable(), truth, strict=True):
        found = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad.double()
        wrong += float((found - gradient).square().sum())
        right += float(gradient.square().sum())
    peer.optimizer.zero_grad()
    return abs(loss - expected) / abs(expected), float((wrong / right) ** 0.5)


def oracle(parts: Parts, new: Tensor, replay: Tensor, replay_weight: float, kl_weight: float) -> Tensor:
    """LM(new) + w·LM(replay) + w'·KL(teacher ‖ student on replay) in float64; means over predicted tokens."""
    loss = _nll(parts.student(new), new)
    if not parts.replay:
        return loss
    assert parts.teacher is not None
    logits = parts.student(replay)
    with torch.no_grad():
        target = parts.teacher(replay)
    q, p = (_log_softmax(x[:, :-1]) for x in (logits, target))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return loss + replay_weight * _nll(logits, replay) + kl_weight * kl


def _log_softmax(logits: Tensor) -> Tensor:
    assert logits.dtype == torch.float64
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def _nll(logits: Tensor, tokens: Tensor) -> Tensor:
    return -_log_softmax(logits[:, :-1]).gather(-1, tokens[:, 1:, None]).mean()
