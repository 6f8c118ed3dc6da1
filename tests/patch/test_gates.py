"""Gates and coupling against plain formulas: means over real tokens, and the additive coupling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from patching import every_gate
from torch import Tensor, nn

from revpatch.patch.coupling import ACTIVATIONS, AdditiveCoupling
from revpatch.patch.gates import GATES, Gate

EPS = torch.finfo(torch.float64).eps


def _gate(kind: str, width: int = 5) -> Gate:
    gate = GATES[kind](width).double()
    with torch.no_grad():
        gate.weight.normal_()
        gate.bias.normal_()
    return gate


def _plain(kind: str, gate: Gate, x: Tensor, mask: Tensor | None) -> Tensor:
    """The definition, token by token."""
    rows, time = x.shape[:2]
    out = torch.zeros(rows, time, 1, dtype=x.dtype)
    for row in range(rows):
        for t in range(time):
            seen = {"seq": range(time), "prefix": range(t + 1), "token": range(t, t + 1)}[kind]
            real = [i for i in seen if mask is None or kind == "token" or mask[row, i]]
            scores = [(x[row, i] @ gate.weight).item() for i in real]
            mean = math.fsum(scores) / len(scores) if scores else 0.0
            out[row, t, 0] = 1 / (1 + math.exp(-mean - gate.bias.item()))
    return out


@every_gate
@pytest.mark.parametrize("masked", [False, True])
def test_a_gate_equals_a_plain_loop(gate: str, masked: bool) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        module, x = _gate(gate), 3 * torch.randn(3, 4 + seed, 5, dtype=torch.float64)
        mask = torch.ones(3, 4 + seed, dtype=torch.long) if masked else None
        if mask is not None:
            mask[0, :seed] = mask[1, 4:] = mask[2, :2] = mask[2, 5:] = 0
        value = module(x, mask)
        assert value.shape == (3, 4 + seed, 1)
        # A mean of at most 12 scores of at most 30, each with a few roundings; the sigmoid's slope is at most 1/4.
        assert (value - _plain(gate, module, x, mask)).abs().max() <= 12 * 30 * EPS


@every_gate
@pytest.mark.parametrize("junk", [1e30, float("nan")])
def test_padding_never_enters(gate: str, junk: float) -> None:
    """Neither a gate nor its gradient sees what stands in padding, whatever the mask's type."""
    module, x = _gate(gate), torch.randn(2, 7, 5, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    real = mask.bool()
    dirty = x.masked_fill(~real[..., None], junk)
    for dtype in (torch.long, torch.bool, torch.float32):
        value = module(dirty, mask.to(dtype))[real]
        assert torch.equal(value, module(x, mask)[real])
        if gate != "token":
            value.sum().backward()
            assert module.bias.grad is not None and torch.isfinite(module.bias.grad).all()


@every_gate
def test_a_gate_starts_half_open_and_learns_both(gate: str) -> None:
    module = GATES[gate](5)
    value = module(torch.randn(2, 3, 5))
    assert torch.equal(value, torch.full((2, 3, 1), 0.5))
    value.sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0


def test_counting_tokens_does_not_stop_where_bfloat16_does() -> None:
    """The mean of a score that comes late in 1000 tokens: in bfloat16 sums alone it would not move any more."""
    gate = GATES["prefix"](2).bfloat16()
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([1.0, 0.0]))
    x = torch.ones(1, 1000, 2, dtype=torch.bfloat16)
    x[:, 500:] = -1
    for mask in (None, torch.ones(1, 1000)):
        assert abs(float(gate(x, mask).detach()[0, -1]) - 0.5) <= 2**-8


def _filled(coupling: AdditiveCoupling, strength: float = 1.0) -> AdditiveCoupling:
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.copy_(torch.randn_like(parameter) * strength / parameter.shape[-1] ** 0.5)
        coupling.log_scale.fill_(0.3)
    return coupling


@pytest.mark.parametrize("normalize", ["rms", "none"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_coupling_is_the_formula(normalize: str, activation: str) -> None:
    c = _filled(AdditiveCoupling(10, 3, activation, normalize=normalize)).double()
    u = torch.randn(2, 4, 10, dtype=torch.float64) * 5

    def n(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() if normalize == "rms" else x

    def mlp(m: Any, x: Tensor) -> Tensor:
        inner = {"gelu": nn.functional.gelu, "relu": torch.relu, "silu": nn.functional.silu, "tanh": torch.tanh}
        return inner[activation](x @ m.down.weight.T + m.down.bias) @ m.up.weight.T + m.up.bias

    s = torch.exp(c.log_scale)
    a = u[..., :5] + s * mlp(c.f, n(u[..., 5:]))
    b = u[..., 5:] + s * mlp(c.g, n(a))
    torch.testing.assert_close(c(u), torch.cat([a, b], -1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(c.shift(u), torch.cat([a, b], -1) - u, rtol=1e-12, atol=1e-12)


def test_the_coupling_starts_as_the_identity_and_able_to_learn() -> None:
    """At any scale. The last projections are zero and nothing else: their gradients are not."""
    u = torch.randn(2, 3, 8)
    for scale in (0.01, 1.0, 30.0):
        c = AdditiveCoupling(8, 4, init_scale=scale)
        assert torch.equal(c(u), u) and torch.equal(c.inverse(u), u)
        assert c.log_scale.shape == (1,)
        torch.testing.assert_close(c.scale, torch.tensor([scale]))
        (c(u) * torch.randn(2, 3, 8)).sum().backward()
        for mlp in (c.f, c.g):
            assert mlp.up.weight.grad is not None and mlp.up.weight.grad.abs().max() > 0
            assert mlp.down.weight.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"width": 7}, r"7 is odd.*even width"),
        ({"activation": "swish"}, r"'swish'.*gelu"),
        ({"normalize": "layer"}, r"'layer'.*'rms' or 'none'"),
        ({"init_scale": float("nan")}, r"init_scale.*> 0.*nan"),
    ],
)
def test_the_coupling_refuses(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdditiveCoupling(**{"width": 8, "bottleneck": 2, **arguments})
