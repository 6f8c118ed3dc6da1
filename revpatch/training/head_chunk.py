"""One chunk of the loss over the frozen head: from logits to CE, KL and d(logits).

`in_place` does it step by step in buffers that all chunks share; on a CPU a few rows at a time, so that what lies
between logits and d(logits) is small. `compiled` leaves the formula, written out, to torch.compile: meant for GPUs,
where each step by itself reads and writes all logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from revpatch.training.own_code import with_own_code

SLICE_BYTES = 2 * 2**20
"""Float32 logits that go through all steps together on a CPU; never fewer rows than it has threads."""

LARGE_HEAD_BYTES = 32 * 2**20
"""A head beyond this, which a CPU's caches don't hold, is multiplied the other way round."""
TILE = 1024
"""Entries of the vocabulary whose logits are formed at once for such a head."""


class Weights(NamedTuple):
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


class Chunk(Protocol):
    """How a chunk is done."""

    def __call__(
        self, buffers: Buffers, logits: Tensor, taught: Tensor | None, targets: Tensor, weights: Weights, learns: bool
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
    buffers: Buffers, logits: Tensor, taught: Tensor | None, targets: Tensor, weights: Weights, learns: bool
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
    buffers: Buffers, logits: Tensor, taught: Tensor | None, targets: Tensor, weights: Weights, learns: bool
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
    logits: Tensor, taught: Tensor | None, targets: Tensor, weights: Weights, learns: bool
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


def compiled(backend: str | Callable[..., Any] = "inductor") -> Chunk:
    """`written_out`, compiled: one graph with a teacher and one without."""
    function = torch.compile(with_own_code(written_out, "chunk"), backend=backend, fullgraph=True)

    def chunk(
        buffers: Buffers, logits: Tensor, taught: Tensor | None, targets: Tensor, weights: Weights, learns: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        found: tuple[Tensor, Tensor | None, Tensor | None] = function(logits, taught, targets, weights, learns)
        return found

    return chunk
