"""One token of one sequence on a CPU: the map of sidecar.py for a single position, by NumPy.

A step works on a few hundred numbers, so its cost is the number of calls and what each costs, not their size; a call of
NumPy costs a fifth of one of torch. This is the same formula on the same memory; `Sidecar.forward` is what it must
agree with, and what several sequences at once go through, whose calls are shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple
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


class _Mlp(NamedTuple):
    down: Array
    down_bias: Array
    up: Array
    up_bias: Array


class _Views:
    """A sidecar's parameters as arrays over the same memory."""

    def __init__(self, sidecar: Sidecar) -> None:
        owners = [(module._parameters, name) for module in sidecar.modules() for name in module._parameters]
        self.held = [(parameters, name, _pointer(parameters[name])) for parameters, name in owners]
        view = {name: parameter.detach().numpy() for name, parameter in sidecar.named_parameters()}
        self.f, self.g = (
            _Mlp(*(view[f"coupling.{half}.{part}"].T for part in ("down.weight", "down.bias", "up.weight", "up.bias")))
            for half in "fg"
        )
        self.log_scale = view["coupling.log_scale"]
        self.gates = [(view[f"gates.{i}.weight"], view[f"gates.{i}.bias"]) for i in range(len(sidecar.gates))]
        self.activation = _ACTIVATIONS[type(sidecar.coupling.f.activation)]
        self.normed = sidecar.coupling.normalize == "rms"
        self.dtype = sidecar.dtype

    def current(self) -> bool:
        """Whether the parameters still lie where they did."""
        return all(_pointer(parameters[name]) == pointer for parameters, name, pointer in self.held)


_views: WeakKeyDictionary[Sidecar, _Views] = WeakKeyDictionary()


def step(sidecar: Sidecar, u: Tensor, sums: RunningSums | None, first_gate: int) -> Tensor | None:
    """h of one position, (1, 1, d) to the same, in the dtype of u; or None where `Sidecar.forward` must be called.

    That is for more than one real token or sequence, on a GPU, with gradients, or in a dtype that NumPy doesn't know.

    Args:
        sums: the past of prefix gates; None for token gates.
        first_gate: the number of the sidecar's first gate in `sums`.
    """
    if u.shape[:2] != (1, 1) or u.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    views = _views.get(sidecar)
    if views is None or not views.current():
        if sidecar.dtype not in (torch.float32, torch.float64):
            return None
        views = _views[sidecar] = _Views(sidecar)
    if sums is not None and sums.padding is not None:
        return None
    x: Array = (u if u.dtype == views.dtype else u.to(views.dtype)).numpy().reshape(-1)
    half = len(x) // 2
    a, b = x[:half], x[half:]
    update = np.empty_like(x)
    shift_a, shift_b = update[:half], update[half:]
    with np.errstate(all="ignore"):  # as torch does
        scale = float(np.exp(views.log_scale[0]))
        seen = _norm(views, b)
        gate = scale * _gate(views, 0, seen, sums, first_gate) if sidecar.coupled else scale
        np.multiply(_mlp(views, views.f, seen), gate, out=shift_a)
        seen = _norm(views, a + shift_a)
        gate = scale * _gate(views, 1, seen, sums, first_gate) if sidecar.coupled else scale
        np.multiply(_mlp(views, views.g, seen), gate, out=shift_b)
        if not sidecar.coupled:
            update *= _gate(views, 0, _norm(views, x), sums, first_gate)
        update += x
    h = torch.from_numpy(update.reshape(1, 1, -1))
    return h if h.dtype == u.dtype else h.to(u.dtype)


def _mlp(views: _Views, mlp: _Mlp, x: Array) -> Array:
    inner = x @ mlp.down
    inner += mlp.down_bias
    out: Array = views.activation(inner) @ mlp.up
    out += mlp.up_bias
    return out


def _norm(views: _Views, x: Array) -> Array:
    if not views.normed:
        return x
    out: Array = x * (float(np.dot(x, x)) / len(x) + RMS_EPS) ** -0.5
    return out


def _gate(views: _Views, index: int, x: Array, sums: RunningSums | None, first_gate: int) -> float:
    weight, bias = views.gates[index]
    score = float(np.dot(x, weight))
    if sums is not None:
        score = sums.step_mean(first_gate + index, score)
    return 0.5 + 0.5 * math.tanh(0.5 * (score + float(bias[0])))


def _pointer(parameter: Tensor | None) -> int:
    return 0 if parameter is None else parameter.data_ptr()
