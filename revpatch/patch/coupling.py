"""C, the additive coupling, and its inverse, side by side.

u in R^d is split in halves (a, b):

    C:   a' = a + s·F(n(b))      b' = b + s·G(n(a'))
    C⁻¹: b  = b' − s·G(n(a'))    a  = a' − s·F(n(b))

F and G are bottleneck MLPs, n a parameter-free RMS norm or the identity, s = exp(log_scale) > 0. The map is a bijection
whatever F, G and n are (Dinh et al., NICE, 2014). A gate on a half multiplies that half's shift; as it sees only what
the inverse sees too, the gated map stays a bijection.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}

RMS_EPS = 1e-6

HalfGate = Callable[[Tensor], Tensor]
"""A gate on one half: (batch, time, d/2), normalised, to (batch, time, 1)."""


def rms_scale(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x²) + `RMS_EPS`) over the last dimension, (..., d) to (..., 1) (Zhang & Sennrich, 2019)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(norm.square() / x.shape[-1] + RMS_EPS)


def rms_norm(x: Tensor) -> Tensor:
    """x times its `rms_scale`; shape and dtype are kept."""
    return x * rms_scale(x)


class BottleneckMLP(nn.Module):
    """width -> bottleneck -> width; the last projection starts at zero, so the output does too."""

    def __init__(self, width: int, bottleneck: int, activation: str) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, scale_in: Tensor | float = 1.0, scale_out: Tensor | float = 1.0) -> Tensor:
        """scale_out · up(activation(down(scale_in · x))), (..., width) to the same.

        The scales, of each token (..., 1) and of all (1,), are applied where the tensors are narrow.
        """
        inner = nn.functional.linear(x, self.down.weight) * scale_in
        inner = self.activation(inner + self.down.bias)
        return nn.functional.linear(inner, scale_out * self.up.weight, scale_out * self.up.bias)


class AdditiveCoupling(nn.Module):
    """C on the last dimension of (batch, time, d); d is even.

    Args:
        width: d.
        bottleneck: r, the inner width of F and G.
        activation: a key of `ACTIVATIONS`.
        init_scale: s at the start, > 0.
        normalize: "rms" or "none": what F, G and the gates see of a half.

    Raises:
        ValueError: d is odd, or the activation or the norm has another name.
    """

    def __init__(
        self, width: int, bottleneck: int, activation: str = "gelu", init_scale: float = 1.0, normalize: str = "rms"
    ) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(
                f"an additive coupling splits the width in halves, and {width} is odd: use a model of even width"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is unknown: choose one of {sorted(ACTIVATIONS)}")
        if normalize not in ("rms", "none"):
            raise ValueError(f"normalize {normalize!r} is unknown: choose 'rms' or 'none'")
        if not init_scale > 0:
            raise ValueError(f"init_scale is exp(log_scale) and must be > 0, found {init_scale}")
        self.f = BottleneckMLP(width // 2, bottleneck, activation)
        self.g = BottleneckMLP(width // 2, bottleneck, activation)
        # Of shape (1,): DeepSpeed can't hold a parameter without dimensions.
        self.log_scale = nn.Parameter(torch.tensor([math.log(init_scale)]))
        self.normalize = normalize

    @property
    def scale(self) -> Tensor:
        """s, shape (1,)."""
        return self.log_scale.exp()

    def norm(self, x: Tensor) -> Tensor:
        """n(x): what F, G and the gates see."""
        return rms_norm(x) if self.normalize == "rms" else x

    def shift(self, u: Tensor, gate_f: HalfGate | None = None, gate_g: HalfGate | None = None) -> Tensor:
        """C(u) − u, without the cancellation of computing it so: (batch, time, d)."""
        a, b = u.chunk(2, dim=-1)
        shift_a = self._shift(self.f, b, gate_f)
        shift_b = self._shift(self.g, a + shift_a, gate_g)
        return torch.cat([shift_a, shift_b], dim=-1)

    def forward(self, u: Tensor, gate_f: HalfGate | None = None, gate_g: HalfGate | None = None) -> Tensor:
        """C(u): (batch, time, d) to the same."""
        return u + self.shift(u, gate_f, gate_g)

    def inverse(self, h: Tensor, gate_f: HalfGate | None = None, gate_g: HalfGate | None = None) -> Tensor:
        """C⁻¹(h): (batch, time, d) to the same."""
        a, b = h.chunk(2, dim=-1)
        b = b - self._shift(self.g, a, gate_g)
        a = a - self._shift(self.f, b, gate_f)
        return torch.cat([a, b], dim=-1)

    def _shift(self, mlp: BottleneckMLP, x: Tensor, gate: HalfGate | None) -> Tensor:
        shift: Tensor = mlp(x, rms_scale(x) if self.normalize == "rms" else 1.0, self.scale)
        return shift if gate is None else gate(self.norm(x)) * shift
