"""What an optimizer is, in a form that knows no engine, no world size and no ZeRO stage.

By parameter name: the float32 master weight and Adam's two moments; and one step count. Under ZeRO 1 and 2 the next
optimizer step copies the partitioned masters over the module's parameters, so a load that forgets them is undone one
step later; an engine's `load` writes masters, moments, step and parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revpatch.patch.sidecars import Patch

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class EngineState:
    """What an optimizer is, whatever the engine: CPU tensors by parameter name."""

    master: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    """"exp_avg" and "exp_avg_sq", each by parameter name."""
    step: int


def fresh_state(patch: Patch) -> EngineState:
    """The state of an optimizer that has made no step, at the patch's present weights."""
    master = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in patch.named_parameters()}
    zeros = {key: {name: torch.zeros_like(p) for name, p in master.items()} for key in MOMENTS}
    return EngineState(master, zeros, 0)


class TorchState:
    """State in and out of a plain torch AdamW over the module's own parameters."""

    def __init__(self, patch: Patch, optimizer: torch.optim.Optimizer) -> None:
        self.patch, self.optimizer = patch, optimizer

    def state(self) -> EngineState:
        state = fresh_state(self.patch)
        for name, parameter in self.patch.named_parameters():
            held = self.optimizer.state.get(parameter)
            if held:
                state.step = int(held["step"])
                for key in MOMENTS:
                    state.moments[key][name] = held[key].detach().to("cpu", copy=True)
        return state

    @torch.no_grad()
    def load(self, state: EngineState) -> None:
        for name, parameter in self.patch.named_parameters():
            parameter.copy_(state.master[name])
            held = held_of(self.optimizer, parameter)
            held["step"].fill_(state.step)
            for key in MOMENTS:
                held[key].copy_(state.moments[key][name])


def held_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The state of one tensor, made as torch's fused AdamW makes it if there is none yet."""
    held: dict[str, Any] = optimizer.state[parameter]
    if not held:
        held["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for key in MOMENTS:
            held[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return held
