"""The objective in float64, written out, against which bench.py holds every peer before it is timed."""

from __future__ import annotations

import torch
from bench_peers import Parts, Peer
from bench_workload import KL_WEIGHT, REPLAY_WEIGHT
from torch import Tensor


def oracle(parts: Parts, new: Tensor, replay: Tensor) -> Tensor:
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
    return loss + REPLAY_WEIGHT * _nll(logits, replay) + KL_WEIGHT * kl


def errors(peer: Peer, tokens: int) -> tuple[float, float]:
    """Relative errors of the peer's loss and of its gradient, over all that it trains as one vector.

    One new and one replayed block of so many tokens are enough to see a wrong one.
    """
    new, replay = peer.new[:1, :tokens], peer.replay[:1, :tokens]
    parts = peer.parts()
    expected = oracle(parts, new, replay)
    truth = torch.autograd.grad(expected, parts.student.parameters)  # type: ignore[attr-defined]
    peer.optimizer.zero_grad()
    loss = peer.loss(new, replay)
    loss.backward()
    wrong = right = 0.0
    for parameter, gradient in zip(peer.trainable(), truth, strict=True):
        found = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad.double()
        wrong += float((found - gradient).square().sum())
        right += float(gradient.square().sum())
    peer.optimizer.zero_grad()
    return abs(loss.item() - expected.item()) / abs(expected.item()), (wrong / right) ** 0.5


def _log_softmax(logits: Tensor) -> Tensor:
    assert logits.dtype == torch.float64
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def _nll(logits: Tensor, tokens: Tensor) -> Tensor:
    return -_log_softmax(logits[:, :-1]).gather(-1, tokens[:, 1:, None]).mean()
