"""The sidecar: gate and coupling as one residual map, and its inverse.

residual   h = u + g(n(u))·(C(u) − u)           inverted by a fixed-point iteration that reports convergence
coupled    a' = a + g₁(n(b))·s·F(n(b)), b' = b + g₂(n(a'))·s·G(n(a'))      inverted in closed form

With `normalize: channels` both are done in channel coordinates: for u stands u / c, and the change is multiplied by c,
where c (d,) is the root mean square of each channel of the block's output, measured once and frozen. A transformer's
outputs have a few channels that are hundreds of times as large as the median; behind a plain RMS norm F, G and the gate
would see these first. It is the same map conjugated by a diagonal, so it is inverted in the same way.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from revpatch.config import SidecarConfig
from revpatch.patch.coupling import AdditiveCoupling
from revpatch.patch.gates import GATES, History


class SidecarOutput(NamedTuple):
    """What a sidecar did to a block's output."""

    hidden: Tensor
    """h: (batch, time, d), in the dtype of u."""
    gate: Tensor
    """(batch, time, 1), in the compute dtype; the mean of g₁ and g₂ when coupled."""
    update: Tensor
    """h − u before rounding to the dtype of u: (batch, time, d), in the compute dtype."""


class Inversion(NamedTuple):
    """The result of inverting a sidecar."""

    hidden: Tensor
    """The estimate of u."""
    converged: bool
    """Always true for the closed form, unless h or u is not finite."""
    iterations: int
    """0 for the closed form."""
    residual: float
    """The largest, over tokens, of max |h − sidecar(u)| over the larger of max |h| and max |u| of that token."""


class Sidecar(nn.Module):
    """The gated residual after one block.

    It computes in its own dtype and returns the dtype it was given: a float32 sidecar works on a bfloat16 base.

    Args:
        width: d, even.
        config: the knobs.
    """

    def __init__(self, width: int, config: SidecarConfig) -> None:
        super().__init__()
        normalize = "none" if config.normalize == "none" else "rms"
        self.coupling = AdditiveCoupling(width, config.bottleneck, config.activation, config.init_scale, normalize)
        self.channels: Tensor | None
        """c, (d,), > 0, in the compute dtype; ones until it is measured. None without channel coordinates."""
        self.register_buffer("channels", torch.ones(width) if config.normalize == "channels" else None)
        self.coupled = config.placement == "coupled"
        gate = GATES[config.gate]
        self.gates = nn.ModuleList([gate(width // 2), gate(width // 2)] if self.coupled else [gate(width)])

    @property
    def causal(self) -> bool:
        """Return whether position t sees no token after t."""
        return all(bool(gate.causal) for gate in self.gates)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, in which the sidecar computes."""
        return self.coupling.log_scale.dtype

    def forward(
        self, u: Tensor, mask: Tensor | None = None, history: list[History] | None = None, gate_open: bool = False
    ) -> SidecarOutput:
        """Applies the sidecar.

        Args:
            u: (batch, time, d), the block's output.
            mask: (batch, time), 1 for real tokens; None is all real.
            history: one for each gate, when decoding with a cache.
            gate_open: hold every gate at 1 (the coupling alone).
        """
        x = self._to_coordinates(u.to(self.dtype))
        if gate_open:
            update, gate = self.coupling.shift(x), x.new_ones(*x.shape[:-1], 1)
        elif self.coupled:
            update, gate = self._coupled(x, mask, history)
        else:
            gate = self.gates[0](self.coupling.norm(x), mask, history[0] if history else None)
            update = gate * self.coupling.shift(x)
        update = self._from_coordinates(update)
        wide = torch.promote_types(u.dtype, self.dtype)
        return SidecarOutput((u.to(wide) + update.to(wide)).to(u.dtype), gate, update)

    @torch.no_grad()
    def inverse(
        self, h: Tensor, mask: Tensor | None = None, tolerance: float | None = None, max_iterations: int = 200
    ) -> Inversion:
        """u such that forward(u).hidden = h, without gradients.

        Args:
            h: (batch, time, d).
            mask: as in `forward`.
            tolerance: of the residual at which the fixed-point iteration stops; default 16 machine epsilons.
            max_iterations: at which it gives up, with converged = False.
        """
        x = h.to(self.dtype)
        if self.coupled:
            gates = (lambda half, g=gate: g(half, mask) for gate in self.gates)
            u = self._from_coordinates(self.coupling.inverse(self._to_coordinates(x), *gates))
            residual = _residual(x, u, self.forward(u, mask).update)
            return Inversion(u.to(h.dtype), math.isfinite(residual), 0, residual)
        tolerance = 16 * torch.finfo(x.dtype).eps if tolerance is None else tolerance
        u = x - self.forward(x, mask).update
        for iteration in range(1, max_iterations + 1):
            update = self.forward(u, mask).update
            residual = _residual(x, u, update)
            if residual <= tolerance:
                return Inversion(u.to(h.dtype), True, iteration, residual)
            if iteration == max_iterations or not math.isfinite(residual):
                break
            u = x - update
        return Inversion(u.to(h.dtype), False, iteration, residual)

    def _to_coordinates(self, x: Tensor) -> Tensor:
        return x if self.channels is None else x / self.channels

    def _from_coordinates(self, x: Tensor) -> Tensor:
        return x if self.channels is None else x * self.channels

    def _coupled(self, x: Tensor, mask: Tensor | None, history: list[History] | None) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def gate(index: int, half: Tensor) -> Tensor:
            value: Tensor = self.gates[index](half, mask, history[index] if history else None)
            seen.append(value)
            return value

        update = self.coupling.shift(x, lambda b: gate(0, b), lambda a: gate(1, a))
        return update, (seen[0] + seen[1]) / 2


def _residual(h: Tensor, u: Tensor, update: Tensor) -> float:
    """Token by token, as the norms of tokens differ by orders of magnitude, and a large one would hide the others."""
    error = (h - (u + update)).abs().amax(-1)
    size = torch.maximum(h.abs().amax(-1), u.abs().amax(-1))
    return float((error / size.clamp(min=torch.finfo(h.dtype).tiny)).max())


class Patch(nn.Module):
    """The sidecars of one patch, by block.

    Args:
        width: d, the base's width.
        blocks: number of blocks of the base.
        config: the knobs.

    Raises:
        ValueError: `config.layers` names a block that isn't there, or the width is odd.
    """

    def __init__(self, width: int, blocks: int, config: SidecarConfig) -> None:
        super().__init__()
        layers = list(range(blocks)) if config.layers == "all" else sorted(config.layers)
        if layers[-1] >= blocks:
            raise ValueError(f"sidecar.layers names block {layers[-1]}, and the base has blocks 0 to {blocks - 1}")
        self.config = config
        self.width = width
        self.blocks = blocks
        self.layers = layers
        self.sidecars = nn.ModuleDict({f"{layer:02d}": Sidecar(width, config) for layer in layers})

    def sidecar(self, layer: int) -> Sidecar | None:
        """Return the sidecar after block `layer`, or None."""
        return cast("Sidecar | None", self.sidecars._modules.get(f"{layer:02d}"))

    def log_scales(self) -> Tensor:
        """log s of every sidecar, (layers,)."""
        return torch.cat([cast(Sidecar, sidecar).coupling.log_scale for sidecar in self.sidecars.values()])
