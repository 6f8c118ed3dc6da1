"""The additive coupling: its formula, its inverse, its start, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from revpatch.patch.coupling import ACTIVATIONS, AdditiveCoupling, rms_norm


def _filled(coupling: AdditiveCoupling, strength: float = 1.0) -> AdditiveCoupling:
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.copy_(torch.randn_like(parameter) * strength / parameter.shape[-1] ** 0.5)
        coupling.log_scale.fill_(0.3)
    return coupling


@pytest.mark.parametrize("normalize", ["rms", "none"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_is_the_formula(normalize: str, activation: str) -> None:
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


@pytest.mark.parametrize("normalize", ["rms", "none"])
@given(
    half=st.integers(1, 12),
    r=st.integers(1, 9),
    size=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
    gated=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_inverse_undoes_it(normalize: str, half: int, r: int, size: float, seed: int, gated: bool) -> None:
    """Also with gates, which see one half only. Shifts of the stream's own size condition the inverse by about 10."""
    torch.manual_seed(seed)
    c = _filled(AdditiveCoupling(2 * half, r, normalize=normalize), 0.5).double()
    u = size * torch.randn(2, 3, 2 * half, dtype=torch.float64)
    gates: tuple[Callable[[Tensor], Tensor], ...] = ()
    if gated:
        gates = (lambda b: torch.sigmoid(b.sum(-1, keepdim=True)), lambda a: torch.sigmoid(-a.sum(-1, keepdim=True)))
    h = c(u, *gates)
    # With rms, the norm of a tiny half magnifies a rounding of the other by up to the ratio of what was added to it.
    worst = torch.maximum(h.abs().max(), u.abs().max()) * (1 + 1 / u.unflatten(-1, (2, half)).norm(dim=-1).min())
    assert (c.inverse(h, *gates) - u).abs().max() <= 64 * torch.finfo(u.dtype).eps * worst


def test_starts_as_the_identity_at_any_scale() -> None:
    u = torch.randn(2, 3, 8)
    for scale in (0.01, 1.0, 30.0):
        c = AdditiveCoupling(8, 4, init_scale=scale)
        assert torch.equal(c(u), u)
        assert torch.equal(c.inverse(u), u)
        assert c.log_scale.shape == (1,)
        torch.testing.assert_close(c.scale, torch.tensor([scale]))


def test_starts_able_to_learn() -> None:
    """The last projections are zero and nothing else: their gradients are not."""
    c = AdditiveCoupling(8, 4)
    (c(torch.randn(2, 3, 8)) * torch.randn(2, 3, 8)).sum().backward()
    for mlp in (c.f, c.g):
        assert mlp.up.weight.grad is not None
        assert mlp.up.weight.grad.abs().max() > 0
        assert mlp.down.weight.abs().max() > 0


@given(size=st.floats(0.1, 1e6), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_rms_norm_has_unit_rms_at_any_size(size: float, seed: int) -> None:
    """Up to what the 1e-6 beside the mean square takes away: 1e-6 / (2 · 0.1²), for a token of a third of the size."""
    torch.manual_seed(seed)
    x = size * (torch.randn(3, 16, dtype=torch.float64) + 0.1)
    expected = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(rms_norm(x), expected, rtol=5e-4, atol=0)
    assert rms_norm(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_rms_norm_of_zero_is_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"width": 7}, r"7 is odd.*even width"),
        ({"activation": "swish"}, r"'swish'.*gelu"),
        ({"normalize": "layer"}, r"'layer'.*'rms' or 'none'"),
        ({"init_scale": 0.0}, r"init_scale.*> 0.*0\.0"),
        ({"init_scale": float("nan")}, r"init_scale.*nan"),
    ],
)
def test_refuses(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdditiveCoupling(**{"width": 8, "bottleneck": 2, **arguments})
