"""How well the map in use, gate and norm and all, can be undone: measured on the states of real tokens.

The coupled placement always can. The residual one is inverted by a fixed-point iteration that converges while the gated
change is a contraction, which a strong patch need not be: so this is a report, for the person to act on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from revpatch.patch.families import body_of
from revpatch.patch.patched_model import Patch, recording
from revpatch.patch.sidecar import Sidecar, SidecarOutput


@dataclass(frozen=True)
class Invertibility:
    """Over all sidecars of a patch."""

    error: float
    """The largest ‖u − u*‖ / ‖u‖, where u* is recovered from h."""
    converged: int
    """Sidecars whose inversion converged."""
    sidecars: int

    def __str__(self) -> str:
        if self.converged == self.sidecars:
            return f"{self.error:.1e}"
        return f"{self.error:.1e}; {self.sidecars - self.converged} of {self.sidecars} sidecars are no contraction"


@torch.no_grad()
def measure_invertibility(base: nn.Module, patch: Patch, tokens: Tensor, noise: float = 0.0) -> Invertibility:
    """Inverts every sidecar on what it is given in a forward pass.

    Args:
        base: the model that carries the patch.
        patch: the active patch.
        tokens: (rows, time) int64.
        noise: deviation of normal noise that is added to the weights meanwhile: a fresh patch is the identity, whose
            inverse would show nothing.
    """
    recorder = _Inputs()
    with recording(base, recorder):
        body_of(base)(tokens, use_cache=False)
    error, converged = 0.0, 0
    for module, u in zip(patch.sidecars.values(), recorder.inputs, strict=True):
        sidecar = cast(Sidecar, module)
        own = {name: value.clone() for name, value in sidecar.state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        for parameter in sidecar.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * noise).to(parameter.device))
        inversion = sidecar.inverse(sidecar(u).hidden)
        sidecar.load_state_dict(own)
        error = max(error, float((inversion.hidden - u).norm() / u.norm()))
        converged += inversion.converged
    return Invertibility(error, converged, len(recorder.inputs))


class _Inputs:
    """Keeps what each sidecar was given, (rows, time, d) float32."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def measure(self, output: SidecarOutput) -> tuple[Tensor]:
        return (output.hidden.float() - output.update.float(),)

    def record(self, layer: int, hidden: Tensor, measured: tuple[Tensor, ...]) -> None:
        self.inputs.append(measured[0])

    def record_plain(self, layer: int, hidden: Tensor) -> None:
        pass
