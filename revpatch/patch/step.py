"""One token of a decode: the map of sidecar.py for a single position, in as few operations as it takes.

A step works on a few hundred numbers, so its cost is the number of operations and of module calls, not their size.
This is the same formula on (rows, d) tensors with neither; `Sidecar.forward` is what it must agree with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revpatch.patch.coupling import RMS_EPS
from revpatch.patch.gates import History
from revpatch.patch.sidecar import Sidecar

_ROOT_HALF = 0.5**0.5


def _gelu(x: Tensor) -> Tensor:
    """By its formula: torch's own starts oneDNN, which costs more than four operations on a few numbers."""
    return 0.5 * torch.addcmul(x, x, torch.erf(x * _ROOT_HALF))


_ACTIVATIONS: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.GELU: _gelu,
    nn.ReLU: torch.relu,
    nn.SiLU: F.silu,
    nn.Tanh: torch.tanh,
}


def step(sidecar: Sidecar, u: Tensor, histories: list[History] | None) -> Tensor:
    """h of one position, (rows, 1, d) to the same, in the dtype of u; called without gradients.

    Args:
        histories: one for each gate, as in `Sidecar.forward`; their masks are what is known of padding.
    """
    coupling = _part(sidecar, "coupling")
    scale = coupling._parameters["log_scale"].exp()  # type: ignore[union-attr]
    gates = list(_part(sidecar, "gates")._modules.values())
    norm = _normed if coupling.normalize == "rms" else _as_it_is
    x = u.squeeze(1).to(scale.dtype)
    a, b = x.chunk(2, -1)
    if sidecar.coupled:
        b = norm(b)
        shift_a = _mlp(_part(coupling, "f"), b).mul_(scale).mul_(_gate(gates, 0, b, histories))
        a = norm(a + shift_a)
        shift_b = _mlp(_part(coupling, "g"), a).mul_(scale).mul_(_gate(gates, 1, a, histories))
        update = torch.cat((shift_a, shift_b), -1)
    else:
        shift_a = _mlp(_part(coupling, "f"), norm(b)).mul_(scale)
        shift_b = _mlp(_part(coupling, "g"), norm(a + shift_a)).mul_(scale)
        update = torch.cat((shift_a, shift_b), -1).mul_(_gate(gates, 0, norm(x), histories))
    return (x + update).to(u.dtype).unsqueeze(1)


def _part(module: nn.Module, name: str) -> nn.Module:
    """A child, without the detour of `nn.Module.__getattr__`."""
    child = module._modules[name]
    assert child is not None
    return child


def _linear(x: Tensor, layer: nn.Module) -> Tensor:
    parameters = layer._parameters
    return F.linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    activation = _ACTIVATIONS[type(_part(mlp, "activation"))]
    return _linear(activation(_linear(x, _part(mlp, "down"))), _part(mlp, "up"))


def _normed(x: Tensor) -> Tensor:
    mean_square = torch.linalg.vecdot(x, x).mul_(1 / x.shape[-1]).add_(RMS_EPS)
    return x * mean_square.rsqrt_().unsqueeze(-1)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _gate(gates: list[nn.Module | None], index: int, x: Tensor, histories: list[History] | None) -> Tensor:
    """(rows, width) to (rows, 1)."""
    parameters = gates[index]._parameters  # type: ignore[union-attr]
    score = torch.linalg.vecdot(x, parameters["weight"]).unsqueeze(-1)  # type: ignore[arg-type]
    if histories is not None:
        score = histories[index].mean(score).to(score.dtype)
    return (score + parameters["bias"]).sigmoid_()  # type: ignore[operator]
