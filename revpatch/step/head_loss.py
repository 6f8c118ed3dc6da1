"""The loss over the frozen head, without ever holding all the logits.

For hidden states h (N, d), head W (V, d), targets y and, where there is a teacher, its hidden states h*:

    CE = mean_n −log softmax(W h_n)[y_n]
    KL = mean_n Σ_v p*_v (log p*_v − log p_v),  p = softmax(W h / T), p* = softmax(W h* / T)
    loss = ce_weight·CE + kl_weight·T²·KL

Both means are over the tokens whose target is not `ignore_index`. W is frozen, so the loss needs only d(loss)/dh, which
is known as soon as a chunk's logits are: the forward pass walks the tokens in chunks, accumulates the gradient and
drops the logits, so the memory is that of a few chunks. The T² keeps the KL's gradient at the size of the CE's (Hinton
et al., 2015). A chunk is done `in_place`, a few rows at a time in shared buffers, or `compiled`, meant for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from revpatch.step.frozen_base import with_own_code

SLICE_BYTES = 2 * 2**20
"""Float32 logits that go through all steps together on a CPU; never fewer rows than it has threads."""

LARGE_HEAD_BYTES = 32 * 2**20
"""A head beyond this, which a CPU's caches don't hold, is multiplied the other way round."""
TILE = 1024
"""Entries of the vocabulary whose logits are formed at once for such a head."""


class LossWeights(NamedTuple):
    """Of the loss ce·CE + kl·T²·KL."""

    ce: float
    kl: float
    temperature: float


class Buffers:
    """Room for rows of logits, by name, as many as the first who asks for it needs: the pages of a fresh tensor of this
    size cost as much as a softmax."""

    def __init__(self, head: Tensor) -> None:
        self.head = head
        self.wide = torch.promote_types(head.dtype, torch.float32)
        size = head.numel() * head.element_size()
        self.is_large = head.device.type == "cpu" and head.dtype == self.wide and size > LARGE_HEAD_BYTES
        self._made: dict[str, Tensor] = {}

    def room(self, name: str, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """(rows, V), of float32 or wider, with what was left in it."""
        if name not in self._made:
            shape = (rows, self.head.shape[0])
            self._made[name] = torch.empty(shape, dtype=dtype or self.wide, device=self.head.device)
        assert rows <= len(self._made[name]), "the first chunk is the largest"
        return self._made[name][:rows]

    def logits(self, name: str, hidden: Tensor) -> Tensor:
        """hidden·Wᵀ, of hidden (rows, d), in the room of that name; rounded once where the head is narrow."""
        wide = self.room(name, len(hidden))
        if self.is_large:
            return self._logits_by_tiles(hidden, wide)
        if self.head.dtype == self.wide:
            return torch.mm(hidden, self.head.T, out=wide)
        return wide.copy_(torch.mm(hidden, self.head.T, out=self.room("narrow", len(hidden), self.head.dtype)))

    def pull_back(self, d_logits: Tensor, out: Tensor) -> None:
        """d_logits·W (rows, d) into `out`."""
        if self.is_large:
            turned = out.new_empty(out.shape[::-1])
            out.copy_(torch.mm(self.head.T, d_logits.T, out=turned).T)
            return
        if self.head.dtype != self.wide:
            d_logits = self.room("narrow", len(d_logits), self.head.dtype).copy_(d_logits)
        torch.mm(d_logits, self.head, out=out)

    def _logits_by_tiles(self, hidden: Tensor, out: Tensor) -> Tensor:
        """W·hiddenᵀ a tile at a time, each turned while it is in the cache. With few rows, MKL forms hidden·Wᵀ at half
        of the rate that it reaches with large matrices."""
        tile = out.new_empty(TILE, len(hidden))  # all products here have an `out`: autocast leaves them in their type
        for head, columns in zip(self.head.split(TILE), out.split(TILE, dim=1), strict=True):
            columns.copy_(torch.mm(head, hidden.T, out=tile[: len(head)]).T)
        return out


class ChunkLoss(Protocol):
    """How a chunk is done."""

    def __call__(
        self,
        buffers: Buffers,
        logits: Tensor,
        taught: Tensor | None,
        targets: Tensor,
        weights: LossWeights,
        learns: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """−log p of each target (rows,), KL of each row (rows,), and d(Σ rows)/d(logits) (rows, V).

        Args:
            buffers: `logits` and `taught` are its rooms of these names; what is in them is lost.
            logits, taught: (rows, V), at least one row, float32 or wider; `taught` is None without a teacher, and the
                KL with it.
            targets: (rows,) int64.
            weights: of the terms; the KL comes without its T².
            learns: whether d(logits) is asked for.
        """
        ...


def in_place(
    buffers: Buffers, logits: Tensor, taught: Tensor | None, targets: Tensor, weights: LossWeights, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `Chunk`; d(logits) takes the place of the logits."""
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = max(torch.get_num_threads(), SLICE_BYTES // (4 * logits.shape[1]))
    nll, kl = [], []
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        some = None if taught is None else taught[part]
        part_nll, part_kl = _in_place(buffers, logits[part], some, targets[part], weights, learns)
        nll.append(part_nll)
        if part_kl is not None:
            kl.append(part_kl)
    return torch.cat(nll), torch.cat(kl) if kl else None, logits if learns else None


def _in_place(
    buffers: Buffers, logits: Tensor, taught: Tensor | None, targets: Tensor, weights: LossWeights, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """Of some rows −log p and KL; one softmax for CE and, at T = 1, KL."""
    ce_weight, kl_weight, temperature = weights
    rows, chosen, kl = len(logits), targets[:, None], None
    log_p = log_q = torch.log_softmax(logits, -1, out=buffers.room("log_p", rows))
    nll = -log_p.gather(-1, chosen).squeeze(-1)
    if taught is not None:
        if temperature != 1.0:
            log_q = torch.log_softmax(logits.div_(temperature), -1, out=buffers.room("log_q", rows))
            taught.div_(temperature)
        log_t = torch.log_softmax(taught, -1, out=logits)
        t = torch.exp(log_t, out=taught)
        kl = log_t.sub_(log_q).mul_(t).sum(-1)
    if not learns:
        return nll, kl
    pull = 0.0 if taught is None else kl_weight * temperature  # d(T²·KL)/d(logits) = T·(q − t)
    d_logits = torch.exp(log_p, out=logits)
    share = ce_weight + pull if log_q is log_p else ce_weight
    if share != 1.0:
        d_logits.mul_(share)
    if taught is not None:
        if log_q is not log_p:
            d_logits.add_(log_q.exp_(), alpha=pull)
        d_logits.sub_(t, alpha=pull)
    d_logits.scatter_add_(-1, chosen, torch.full_like(chosen, -ce_weight, dtype=d_logits.dtype))
    return nll, kl


def written_out(
    logits: Tensor, taught: Tensor | None, targets: Tensor, weights: LossWeights, learns: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same without buffers, as one expression of its inputs."""
    ce_weight, kl_weight, temperature = weights
    chosen, kl = targets[:, None], None
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(-1, chosen).squeeze(-1)
    is_target = torch.arange(logits.shape[-1], device=logits.device) == chosen
    d_logits = ce_weight * (log_p.exp() - is_target.to(log_p.dtype))
    if taught is not None:
        log_t, log_q = ((x / temperature).log_softmax(-1) for x in (taught, logits))
        t = log_t.exp()
        kl = (t * (log_t - log_q)).sum(-1)
        d_logits = d_logits + kl_weight * temperature * (log_q.exp() - t)
    return nll, kl, d_logits if learns else None


def compiled(backend: str | Callable[..., Any] = "inductor") -> ChunkLoss:
    """`written_out`, compiled: one graph with a teacher and one without."""
    function = torch.compile(with_own_code(written_out, "chunk"), backend=backend, fullgraph=True)

    def chunk(
        buffers: Buffers,
        logits: Tensor,
        taught: Tensor | None,
        targets: Tensor,
        weights: LossWeights,
        learns: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        found: tuple[Tensor, Tensor | None, Tensor | None] = function(logits, taught, targets, weights, learns)
        return found

    return chunk


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
    chunk: ChunkLoss = in_place,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted loss and its parts.

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
    rows, weights = _rows(head, chunk_bytes), LossWeights(ce_weight, kl_weight, temperature)
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
        weights: LossWeights,
        rows: int,
        ignore_index: int,
        chunk: ChunkLoss,
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
