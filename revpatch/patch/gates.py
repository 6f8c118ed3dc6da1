"""The gates: how much of the patch a position gets, in (0, 1).

With z_t = wᵀ x_t and the mean over real tokens only (padding never enters it):

    SeqGate     g_t = σ(mean over all t' of z_t' + b)     sees the future: not causal
    PrefixGate  g_t = σ(mean over t' ≤ t of z_t' + b)     the same formula on each prefix
    TokenGate   g_t = σ(z_t + b)

PrefixGate equals SeqGate at the last position. Since the mean of wᵀx is wᵀ of the mean, decoding needs one number a
gate; `History` is where it is kept.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

NO_CACHE = (
    "a SeqGate depends on the whole sequence, so past positions change with each new token and a KV cache can't hold "
    "them: call the model with use_cache=False, or train with gate: prefix"
)
"""Why a SeqGate is refused where there is a past."""


class History(Protocol):
    """What a gate must know of the tokens before this call; kept between calls while decoding."""

    def mean(self, scores: Tensor) -> Tensor:
        """Return the means over the real tokens up to each of this call's, (batch, time) as their scores, which it
        keeps."""
        ...


class Gate(nn.Module):
    """w and b; both start at zero, so every gate starts half open."""

    causal = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, mask: Tensor | None = None, history: History | None = None) -> Tensor:
        """Return the gate.

        Args:
            x: (batch, time, width).
            mask: (batch, time), 1 for real tokens and 0 for padding; None is all real.
            history: the tokens before x[:, 0], when decoding with a cache.

        Returns:
            (batch, time, 1), in (0, 1).
        """
        raise NotImplementedError

    def scores(self, x: Tensor) -> Tensor:
        """z = wᵀx, (batch, time)."""
        return x @ self.weight


class SeqGate(Gate):
    """The original recipe's gate: one value for the whole sequence, so each position sees the ones after it."""

    causal = False

    def forward(self, x: Tensor, mask: Tensor | None = None, history: History | None = None) -> Tensor:
        if history is not None:
            raise ValueError(NO_CACHE)
        z = self.scores(x)
        if mask is None:
            mean = z.mean(dim=1, keepdim=True)
        else:
            z, m = _real(z, mask)
            mean = z.sum(dim=1, keepdim=True) / m.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.sigmoid(mean + self.bias).unsqueeze(-1).expand(-1, x.shape[1], -1)


class PrefixGate(Gate):
    """The same formula on each prefix: causal, and the same while decoding with a cache."""

    def forward(self, x: Tensor, mask: Tensor | None = None, history: History | None = None) -> Tensor:
        z = self.scores(x)
        z = z.to(torch.promote_types(z.dtype, torch.float32))  # bfloat16 can't count beyond 256
        if history is not None:
            mean = history.mean(z)
        elif mask is None:
            mean = z.cumsum(dim=1) / torch.arange(1, z.shape[1] + 1, dtype=z.dtype, device=z.device)
        else:
            z, m = _real(z, mask)
            mean = z.cumsum(dim=1) / m.cumsum(dim=1).clamp(min=1)
        return torch.sigmoid(mean.to(x.dtype) + self.bias).unsqueeze(-1)


class TokenGate(Gate):
    """Each token by itself: causal, and without memory."""

    def forward(self, x: Tensor, mask: Tensor | None = None, history: History | None = None) -> Tensor:
        return torch.sigmoid(self.scores(x) + self.bias).unsqueeze(-1)


def _real(z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores with padding's at zero, whatever they were (0 · inf is not zero), and the mask in their
    dtype."""
    real = mask.bool()
    return z.masked_fill(~real, 0), real.to(z.dtype)


GATES: dict[str, type[Gate]] = {"prefix": PrefixGate, "seq": SeqGate, "token": TokenGate}
