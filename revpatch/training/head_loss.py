"""The loss over the frozen head, without ever holding all the logits.

For hidden states h (N, d), head W (V, d), targets y and, where there is a teacher, its hidden states h*:

    CE = mean_n −log softmax(W h_n)[y_n]
    KL = mean_n Σ_v p*_v (log p*_v − log p_v),  p = softmax(W h / T), p* = softmax(W h* / T)
    loss = ce_weight·CE + kl_weight·T²·KL

Both means are over the tokens whose target is not `ignore_index`; the others have no loss and no gradient.

W is frozen, so the loss needs only d(loss)/dh, and that is known as soon as a chunk's logits are: the forward pass
walks the tokens in chunks, forms the softmax once for CE and (at T = 1) KL, accumulates the gradient and drops the
logits. The memory is that of a few chunks whatever N is. The T² keeps the KL's gradient at the size of the CE's (Hinton
et al., 2015). What is done with a chunk: revpatch/training/head_chunk.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revpatch.training.head_chunk import Buffers, Chunk, Weights, in_place

CPU_CHUNK_BYTES = 2 * 2**20
"""Size of a chunk of float32 logits on a CPU: what its caches hold."""
GPU_CHUNK_BYTES = 256 * 2**20
"""The same on a GPU: what fills it."""
MIN_ROWS = 128
"""At least so many tokens a chunk, however large the vocabulary: the head is read once a chunk."""
IGNORE_INDEX = -100
"""The target of tokens that don't count, as torch's cross_entropy has it."""


def frozen_head_loss(
    hidden: Tensor,
    targets: Tensor,
    head: Tensor,
    teacher: Tensor | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    chunk: Chunk = in_place,
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
        ignore_index: target of the tokens that don't count, in CE and in KL. If none counts, all three are 0.
        chunk: how a chunk is done: `in_place`, or `head_chunk.compiled()`.

    Returns:
        loss (), with a gradient; CE () and T²·KL (), detached; nats per token, float32 (float64 for float64 input).
    """
    assert hidden.dim() == 2 and targets.shape == hidden.shape[:1]
    assert teacher is not None or kl_weight == 0.0, "a KL needs a teacher"
    rows, weights = _rows(head, chunk_bytes), Weights(ce_weight, kl_weight, temperature)
    loss, ce, kl = _FrozenHeadLoss.apply(hidden, head, targets, teacher, weights, rows, ignore_index, chunk)
    return loss, ce, kl


@torch.no_grad()
def token_nll(hidden: Tensor, targets: Tensor, head: Tensor, chunk_bytes: int | None = None) -> Tensor:
    """−log p(target) of each token, (N,) float32, for evaluation; shapes as in `frozen_head_loss`."""
    rows = _rows(head, chunk_bytes)
    parts, buffers = [], Buffers(head)
    for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = buffers.logits("logits", h)
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
        weights: Weights,
        rows: int,
        ignore_index: int,
        chunk: Chunk,
    ) -> tuple[Tensor, Tensor, Tensor]:
        counts = targets != ignore_index
        targets = targets.masked_fill(~counts, 0)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        buffers = Buffers(head)
        ce = kl = torch.zeros((), dtype=buffers.wide, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = buffers.logits("logits", hidden[part])
            taught = None if teacher is None else buffers.logits("taught", teacher[part])
            nll, row_kl, d_logits = chunk(buffers, logits, taught, targets[part], weights, gradient is not None)
            ce = ce + nll.masked_fill(~counts[part], 0).sum()
            if row_kl is not None:
                kl = kl + row_kl.masked_fill(~counts[part], 0).sum()
            if gradient is not None and d_logits is not None:
                buffers.pull_back(d_logits, gradient[part])
        number = counts.sum().clamp(min=1).to(buffers.wide)  # on the device, as the host can't know it without waiting
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(number).masked_fill_(~counts[:, None], 0))
        ce, kl = ce / number, kl * (weights.temperature**2 / number)
        loss = weights.ce * ce + weights.kl * kl
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_loss, *(None,) * 7


def _rows(head: Tensor, chunk_bytes: int | None) -> int:
    if chunk_bytes is not None:
        return max(1, chunk_bytes // (4 * head.shape[0]))
    budget = CPU_CHUNK_BYTES if head.device.type == "cpu" else GPU_CHUNK_BYTES
    return max(MIN_ROWS, budget // (4 * head.shape[0]))
