"""One token of one sequence on a CPU: the map of sidecar.py for a single position, by NumPy.

A step works on a few hundred numbers, so its cost is the number of calls and what each costs, not their size; a call of
NumPy costs a fifth of one of torch. So norms are applied as numbers to what is narrow, and all that a step needs lies
in the closure of one function a sidecar. This is the same formula on the same memory; `Sidecar.forward` is what it must
agree with, and what several sequences at once go through, whose calls are shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from revpatch.patch.coupling import RMS_EPS
from revpatch.patch.decoding import RunningSums
from revpatch.patch.sidecar import Sidecar

Array = NDArray[Any]


def _gelu(x: Array) -> Array:
    erf: Array = x * x.dtype.type(0.5**0.5)
    torch.from_numpy(erf).erf_()
    erf += 1
    erf *= x
    erf *= 0.5
    return erf


_ACTIVATIONS: dict[type[nn.Module], Callable[[Array], Array]] = {
    nn.GELU: _gelu,
    nn.ReLU: lambda x: np.maximum(x, 0),
    nn.SiLU: lambda x: x * (0.5 + 0.5 * np.tanh(0.5 * x)),
    nn.Tanh: np.tanh,
}

ShiftOfHalf = Callable[[Array], Array]
"""A half, as it is, to F or G of it normalised."""
GateOfOne = Callable[[Array, RunningSums | None, int], float]
"""What a gate sees, not normalised, the past of prefix gates and the gate's number there, to its value."""


class _Step:
    """The map of one sidecar, over its parameters' own memory."""

    def __init__(self, sidecar: Sidecar) -> None:
        owners: list[dict[str, Any]] = [module._parameters for module in sidecar.modules()]
        if sidecar.channels is not None:
            owners.append(sidecar._buffers)
        self.held = [(owner, name, owner[name].data_ptr()) for owner in owners for name in owner]
        self.dtype = sidecar.dtype
        self.run = _run(sidecar)

    def current(self) -> bool:
        """Return whether the parameters still lie where they did."""
        for owner, name, pointer in self.held:  # noqa: SIM110  (a generator would cost as much as the looking)
            if owner[name].data_ptr() != pointer:
                return False
        return True


_steps: WeakKeyDictionary[Sidecar, _Step] = WeakKeyDictionary()


def step(sidecar: Sidecar, u: Tensor, sums: RunningSums | None, first_gate: int) -> Tensor | None:
    """h of one position, (1, 1, d) to the same, in the dtype of u; or None where `Sidecar.forward` must be called.

    That is for more than one real token or sequence, on a GPU, with gradients, or in a dtype that NumPy doesn't know.

    Args:
        sums: the past of prefix gates; None for token gates.
        first_gate: the number of the sidecar's first gate in `sums`.
    """
    if u.shape[:2] != (1, 1) or u.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    made = _steps.get(sidecar)
    if made is None or not made.current():
        if sidecar.dtype not in (torch.float32, torch.float64):
            return None
        made = _steps[sidecar] = _Step(sidecar)
    if sums is not None and sums.padding is not None:
        return None
    x: Array = (u if u.dtype == made.dtype else u.to(made.dtype)).numpy().reshape(-1)
    with np.errstate(all="ignore"):  # as torch does
        h = torch.from_numpy(made.run(x, sums, first_gate).reshape(1, 1, -1))
    return h if h.dtype == u.dtype else h.to(u.dtype)


def _run(sidecar: Sidecar) -> Callable[[Array, RunningSums | None, int], Array]:
    """u to h, both (d,), with the past of prefix gates and the number of the first gate there."""
    normed = sidecar.coupling.normalize == "rms"
    gates = [_gate(gate, normed) for gate in sidecar.gates]
    f, g = (_shift(mlp, normed) for mlp in (sidecar.coupling.f, sidecar.coupling.g))
    log_scale, half = sidecar.coupling.log_scale.detach().numpy(), sidecar.coupling.f.down.in_features
    channels = None if sidecar.channels is None else sidecar.channels.numpy()

    def residual(x: Array, sums: RunningSums | None, first: int) -> Array:
        scale = float(np.exp(log_scale[0]))
        gate = gates[0](x, sums, first)
        a, b, change = x[:half], x[half:], np.empty_like(x)
        shift = f(b)
        shift *= scale
        np.multiply(shift, gate, out=change[:half])
        shift += a
        np.multiply(g(shift), scale * gate, out=change[half:])
        return change

    def coupled(x: Array, sums: RunningSums | None, first: int) -> Array:
        scale = float(np.exp(log_scale[0]))
        a, b, change = x[:half], x[half:], np.empty_like(x)
        np.multiply(f(b), scale * gates[0](b, sums, first), out=change[:half])
        moved = a + change[:half]
        np.multiply(g(moved), scale * gates[1](moved, sums, first + 1), out=change[half:])
        return change

    change_of = coupled if sidecar.coupled else residual

    def run(u: Array, sums: RunningSums | None, first: int) -> Array:
        if channels is None:
            h = change_of(u, sums, first)
        else:
            h = change_of(u / channels, sums, first)
            h *= channels
        h += u
        return h

    return run


def _shift(mlp: nn.Module, normed: bool) -> ShiftOfHalf:
    view = {name: parameter.detach().numpy() for name, parameter in mlp.named_parameters()}
    down, down_bias, up, up_bias = (view[name] for name in ("down.weight", "down.bias", "up.weight", "up.bias"))
    activation = _ACTIVATIONS[type(cast(nn.Module, mlp.activation))]

    def shift(x: Array) -> Array:
        inner: Array = down.dot(x)
        if normed:
            inner *= (float(x.dot(x)) / len(x) + RMS_EPS) ** -0.5
        inner += down_bias
        out: Array = up.dot(activation(inner))
        out += up_bias
        return out

    return shift


def _gate(gate: nn.Module, normed: bool) -> GateOfOne:
    view = {name: parameter.detach().numpy() for name, parameter in gate.named_parameters()}
    weight, bias = view["weight"], view["bias"]

    def value(x: Array, sums: RunningSums | None, number: int) -> float:
        score = float(x.dot(weight))
        if normed:
            score *= (float(x.dot(x)) / len(x) + RMS_EPS) ** -0.5
        if sums is not None:
            score = sums.step_mean(number, score)
        return 0.5 + 0.5 * math.tanh(0.5 * (score + float(bias[0])))

    return value
