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

CHUNK_BYTES = 64 * 2**20
"""Default size of a chunk of float32 logits."""


def frozen_head_loss(
    hidden: Tensor,
    targets: Tensor,
    head: Tensor,
    teacher: Tensor | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted loss and its parts.

    Args:
        hidden: (N, d), any float dtype; the only input that gets a gradient.
        targets: (N,) int64.
        head: (V, d), frozen, in the dtype of `hidden`.
        teacher: (N, d), the teacher's last hidden states; needed when kl_weight is not 0.
        ce_weight, kl_weight: weights of CE and of T²·KL.
        temperature: T.
        chunk_bytes: size of a chunk of float32 logits.

    Returns:
        loss (), with a gradient; CE () and T²·KL (), detached; nats per token, float32 (float64 for float64 input).
    """
    assert hidden.dim() == 2 and targets.shape == hidden.shape[:1]
    assert teacher is not None or kl_weight == 0.0, "a KL needs a teacher"
    rows = max(1, chunk_bytes // (4 * head.shape[0]))
    loss, ce, kl = _FrozenHeadLoss.apply(hidden, head, targets, teacher, ce_weight, kl_weight, temperature, rows)
    return loss, ce, kl


def token_nll(hidden: Tensor, targets: Tensor, head: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """−log p(target) of each token, (N,) float32, for evaluation; shapes as in `frozen_head_loss`."""
    rows = max(1, chunk_bytes // (4 * head.shape[0]))
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
            log_p = logits.log_softmax(-1)
            chosen = targets[part, None]
            ce = ce - log_p.gather(-1, chosen).sum()
            if gradient is not None:
                d_logits = log_p.exp().mul_(ce_weight)
                d_logits.scatter_add_(-1, chosen, torch.full_like(chosen, -ce_weight, dtype=d_logits.dtype))
            if teacher is not None:
                log_q = log_p if temperature == 1.0 else (logits / temperature).log_softmax(-1)
                log_t = _wide(teacher[part] @ head.T).div_(temperature).log_softmax(-1)
                t = log_t.exp()
                kl = kl + (t * (log_t - log_q)).sum()
                if gradient is not None and kl_weight:
                    # d(T²·KL)/d(logits) = T·(p − p*)
                    d_logits.add_(log_q.exp().sub_(t), alpha=kl_weight * temperature)
            if gradient is not None:
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
        return gradient * d_loss.to(gradient.dtype), *(None,) * 7


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
