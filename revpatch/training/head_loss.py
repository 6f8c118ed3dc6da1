"""The loss over the frozen head, without ever holding all the logits.

For hidden states h (N, d), head W (V, d), targets y and, where there is a teacher, its hidden states h*:

    CE = mean_n −log softmax(W h_n)[y_n]
    KL = mean_n Σ_v p*_v (log p*_v − log p_v),  p = softmax(W h / T), p* = softmax(W h* / T)
    loss = ce_weight·CE + kl_weight·T²·KL

W is frozen, so the loss needs only d(loss)/dh, and that is known as soon as a chunk's logits are: the forward pass
walks the tokens in chunks, forms the softmax once for CE and (at T = 1) KL, accumulates the gradient and drops the
logits. The memory is one chunk of logits whatever N is. The T² keeps the KL's gradient at the size of the CE's (Hinton
et al., 2015).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CPU_CHUNK_BYTES = 2 * 2**20
"""Size of a chunk of float32 logits on a CPU: what its caches hold."""
GPU_CHUNK_BYTES = 256 * 2**20
"""The same on a GPU: what fills it."""
MIN_ROWS = 128
"""At least so many tokens a chunk, however large the vocabulary: the head is read once a chunk."""


def frozen_head_loss(
    hidden: Tensor,
    targets: Tensor,
    head: Tensor,
    teacher: Tensor | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted loss and its parts.

    Args:
        hidden: (N, d), any float dtype; the only input that gets a gradient.
        targets: (N,) int64.
        head: (V, d), frozen, in the dtype of `hidden`.
        teacher: (N, d), the teacher's last hidden states; needed when kl_weight is not 0.
        ce_weight, kl_weight: weights of CE and of T²·KL.
        temperature: T.
        chunk_bytes: size of a chunk of float32 logits; default: see `CPU_CHUNK_BYTES`, but at least `MIN_ROWS` tokens.

    Returns:
        loss (), with a gradient; CE () and T²·KL (), detached; nats per token, float32 (float64 for float64 input).
    """
    assert hidden.dim() == 2 and targets.shape == hidden.shape[:1]
    assert teacher is not None or kl_weight == 0.0, "a KL needs a teacher"
    rows = _rows(head, chunk_bytes)
    loss, ce, kl = _FrozenHeadLoss.apply(hidden, head, targets, teacher, ce_weight, kl_weight, temperature, rows)
    return loss, ce, kl


def token_nll(hidden: Tensor, targets: Tensor, head: Tensor, chunk_bytes: int | None = None) -> Tensor:
    """−log p(target) of each token, (N,) float32, for evaluation; shapes as in `frozen_head_loss`."""
    rows = _rows(head, chunk_bytes)
    parts = []
    for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = _wide(h @ head.T)
        parts.append(logits.logsumexp(-1) - logits.gather(-1, y[:, None]).squeeze(-1))
    return torch.cat(parts).float()


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        teacher: Tensor | None,
        ce_weight: float,
        kl_weight: float,
        temperature: float,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = hidden.shape[0]
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        ce = kl = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            logits = _wide(hidden[part] @ head.T)
            chosen = targets[part, None]
            log_p = logits.log_softmax(-1)
            ce = ce - log_p.gather(-1, chosen).sum()
            pulls = [(log_p, ce_weight)]  # d(loss)/d(logits) is Σ weight·exp(log-probabilities), less the targets
            if teacher is not None:
                log_t = _wide(teacher[part] @ head.T).div_(temperature).log_softmax(-1)
                log_q = log_p if temperature == 1.0 else logits.div_(temperature).log_softmax(-1)
                t = log_t.exp()
                kl = kl + torch.dot(t.flatten(), log_t.sub_(log_q).flatten())
                # d(T²·KL)/d(logits) = T·(q − t)
                pull = kl_weight * temperature
                pulls = [(log_p, ce_weight + pull)] if log_q is log_p else [*pulls, (log_q, pull)]
            if gradient is None:
                continue
            d_logits = pulls[0][0].exp_().mul_(pulls[0][1])
            if teacher is not None:
                for log_q, pull in pulls[1:]:
                    d_logits.add_(log_q.exp_(), alpha=pull)
                d_logits.sub_(t, alpha=kl_weight * temperature)
            d_logits.scatter_add_(-1, chosen, torch.full_like(chosen, -ce_weight, dtype=d_logits.dtype))
            gradient[part] = d_logits.to(head.dtype) @ head
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(count))
        ce, kl = ce / count, kl * (temperature**2 / count)
        loss = ce_weight * ce + kl_weight * kl
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_loss, *(None,) * 7


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _rows(head: Tensor, chunk_bytes: int | None) -> int:
    if chunk_bytes is not None:
        return max(1, chunk_bytes // (4 * head.shape[0]))
    budget = CPU_CHUNK_BYTES if head.device.type == "cpu" else GPU_CHUNK_BYTES
    return max(MIN_ROWS, budget // (4 * head.shape[0]))
