"""The sidecar over every gate, placement, norm and dtype: formula, inverse, gradients, dtypes.

Tolerances are counted in machine epsilons of the dtype in which h and u are held, relative to each token's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from revpatch.config import SidecarConfig
from revpatch.patch.gates import GATES
from revpatch.patch.sidecar import Sidecar

every_gate = pytest.mark.parametrize("gate", sorted(GATES))
every_placement = pytest.mark.parametrize("placement", ["residual", "coupled"])
every_norm = pytest.mark.parametrize("normalize", ["channels", "rms", "none"])
every_dtype = pytest.mark.parametrize(
    ("dtype", "input_dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["float64", "float32", "bfloat16"],
)

MASK = torch.ones(3, 11, dtype=torch.long)
MASK[0, :4] = 0
MASK[1, 9:] = 0

Make = Callable[..., Sidecar]


@pytest.fixture
def make(randomize: Callable[..., Any]) -> Make:
    """make(gate, placement, normalize, dtype, strength=1.0, width=16, seed=1): a sidecar with random weights."""

    def _make(
        gate: str,
        placement: str,
        normalize: str = "rms",
        dtype: torch.dtype = torch.float32,
        strength: float = 1.0,
        width: int = 16,
        seed: int = 1,
    ) -> Sidecar:
        config = SidecarConfig.model_validate(
            {"bottleneck": 5, "gate": gate, "placement": placement, "normalize": normalize}
        )
        return cast(Sidecar, randomize(Sidecar(width, config).to(dtype), seed, strength))

    return _make


def _error(found: Tensor, u: Tensor, h: Tensor) -> float:
    """In epsilons of u's dtype, the largest over tokens."""
    size = torch.maximum(u.abs().amax(-1), h.abs().amax(-1))
    return ((found.double() - u.double()).abs().amax(-1) / size).max().item() / torch.finfo(u.dtype).eps


@every_gate
@every_norm
@every_dtype
def test_residual_is_inverted(
    make: Make, gate: str, normalize: str, dtype: torch.dtype, input_dtype: torch.dtype
) -> None:
    """Iteration stops at a residual of 16 eps, so the error is 16 / (1 − L): 64 while the Lipschitz constant is ≤ 3/4.

    With bfloat16 in and out the roundings of h and u to bfloat16, half an eps each, dwarf that: (1/2) / (1 − L) + 1/2.
    """
    for seed in range(4):
        sidecar = make(gate, "residual", normalize, dtype, strength=0.3, seed=seed)
        u = torch.randn(3, 11, 16, dtype=torch.float64).to(input_dtype)
        h = sidecar(u, MASK).hidden
        assert (h - u).abs().max() > 0.05
        result = sidecar.inverse(h, MASK)
        assert result.converged
        assert 1 <= result.iterations < 100
        assert result.residual <= 16 * torch.finfo(dtype).eps
        assert result.hidden.dtype == input_dtype
        assert _error(result.hidden, u, h) <= (2.5 if input_dtype == torch.bfloat16 else 64)


@every_gate
@every_norm
@every_dtype
def test_coupled_is_inverted_in_closed_form(
    make: Make, gate: str, normalize: str, dtype: torch.dtype, input_dtype: torch.dtype
) -> None:
    """Six roundings, amplified by less than 3 while shifts are half of the stream; in bfloat16 those of h and u."""
    for seed in range(4):
        sidecar = make(gate, "coupled", normalize, dtype, strength=0.5, seed=seed)
        u = torch.randn(3, 11, 16, dtype=torch.float64).to(input_dtype)
        h = sidecar(u, MASK).hidden
        assert (h - u).abs().max() > 0.1
        result = sidecar.inverse(h, MASK)
        assert result.converged
        assert result.iterations == 0
        assert result.residual <= 16 * torch.finfo(dtype).eps
        assert result.hidden.dtype == input_dtype
        assert _error(result.hidden, u, h) <= (2.5 if input_dtype == torch.bfloat16 else 18)


@every_gate
@every_norm
@pytest.mark.parametrize("strength", [0.1, 1.0, 4.0, 16.0, 64.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_coupled_is_exact_at_any_strength(
    make: Make, gate: str, normalize: str, strength: float, dtype: torch.dtype
) -> None:
    """The inverse maps back to h within a few eps, and misses u by that times the map's own conditioning."""
    for seed in range(4):
        sidecar = make(gate, "coupled", normalize, dtype, strength, seed=seed)
        u = torch.randn(1, 1, 16, dtype=dtype)
        h = sidecar(u).hidden
        result = sidecar.inverse(h)
        assert result.converged
        eps = torch.finfo(dtype).eps
        exact = sidecar.double()
        jacobian = torch.autograd.functional.jacobian(lambda x, s=exact: s(x).hidden, u.double()).reshape(16, 16)
        conditioning = torch.linalg.inv(jacobian).abs().sum(1).max().item()
        size = torch.maximum(h.abs().max(), u.abs().max()).item()
        assert (result.hidden - u).abs().max().item() <= 16 * eps * conditioning * size


@every_gate
@every_norm
@every_dtype
def test_residual_admits_that_it_did_not_converge(
    make: Make, gate: str, normalize: str, dtype: torch.dtype, input_dtype: torch.dtype
) -> None:
    """With gates wide open and updates many times the stream the map is no contraction."""
    sidecar = make(gate, "residual", normalize, dtype, strength=8.0)
    with torch.no_grad():
        cast(Any, sidecar.gates[0]).weight.zero_()
        cast(Any, sidecar.gates[0]).bias.fill_(5.0)
    h = sidecar(torch.randn(3, 11, 16).to(input_dtype)).hidden
    result = sidecar.inverse(h)
    assert not result.converged
    assert not result.residual < 1e-3  # nan, once it has overflowed, is admitted too
    assert result.iterations <= 200


@every_gate
def test_residual_gives_up_when_told(make: Make, gate: str) -> None:
    sidecar = make(gate, "residual", dtype=torch.float64, strength=0.3)
    h = sidecar(torch.randn(2, 5, 16, dtype=torch.float64)).hidden
    early = sidecar.inverse(h, max_iterations=2)
    assert not early.converged
    assert early.iterations == 2
    rough = sidecar.inverse(h, tolerance=1e-3)
    assert rough.converged
    assert 1e-12 < rough.residual <= 1e-3
    assert rough.iterations < sidecar.inverse(h).iterations


@every_placement
def test_a_large_token_does_not_hide_a_small_one(make: Make, placement: str) -> None:
    """Norms in a residual stream differ by orders of magnitude; each token has to be inverted by its own measure."""
    sidecar = make("token", placement, strength=8.0)
    with torch.no_grad():
        for gate in sidecar.gates:
            cast(Any, gate).weight.zero_()
            cast(Any, gate).bias.fill_(3.0)
    u = torch.randn(1, 2, 16)
    u[0, 0] *= 1e9
    h = sidecar(u).hidden
    result = sidecar.inverse(h)
    lost = (sidecar(result.hidden).hidden - h)[0, 1].abs().max() / h[0, 1].abs().max()
    assert result.converged is (lost.item() < 1e-4)
    assert result.converged is (placement == "coupled")


@every_gate
@every_placement
def test_nan_does_not_converge(make: Make, gate: str, placement: str) -> None:
    h = torch.randn(1, 3, 16)
    h[0, 1, 3] = float("nan")
    result = make(gate, placement, strength=0.3).inverse(h)
    assert not result.converged
    assert result.residual != result.residual


@every_placement
def test_inverse_of_the_start_is_the_identity(placement: str) -> None:
    sidecar = Sidecar(16, SidecarConfig.model_validate({"bottleneck": 4, "placement": placement}))
    u = torch.randn(2, 3, 16)
    assert torch.equal(sidecar(u).hidden, u)
    result = sidecar.inverse(u)
    assert torch.equal(result.hidden, u)
    assert result.converged
    assert result.residual == 0
    assert not result.hidden.requires_grad


def _channels(sidecar: Sidecar) -> Tensor:
    """c, which are ones without channel coordinates."""
    return torch.ones(16, dtype=torch.float64) if sidecar.channels is None else sidecar.channels


@every_gate
@every_norm
def test_residual_is_the_formula(make: Make, gate: str, normalize: str) -> None:
    sidecar = make(gate, "residual", normalize, torch.float64)
    u = torch.randn(3, 11, 16, dtype=torch.float64)
    out = sidecar(u, MASK)
    c = _channels(sidecar)
    g = sidecar.gates[0](sidecar.coupling.norm(u / c), MASK)
    assert torch.equal(out.gate, g)
    torch.testing.assert_close(out.hidden, u + g * c * (sidecar.coupling(u / c) - u / c), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out.update, out.hidden - u, rtol=1e-12, atol=1e-12)


@every_gate
@every_norm
def test_coupled_is_the_formula(make: Make, gate: str, normalize: str) -> None:
    sidecar = make(gate, "coupled", normalize, torch.float64)
    c, (g1, g2) = sidecar.coupling, sidecar.gates
    u = torch.randn(3, 11, 16, dtype=torch.float64)
    out = sidecar(u, MASK)
    size = _channels(sidecar)
    a, b = (u / size)[..., :8], (u / size)[..., 8:]
    first = g1(c.norm(b), MASK)
    a = a + first * c.scale * c.f(c.norm(b))
    second = g2(c.norm(a), MASK)
    b = b + second * c.scale * c.g(c.norm(a))
    assert (first - second).abs().max() > 0.1
    torch.testing.assert_close(out.hidden, size * torch.cat([a, b], -1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out.gate, (first + second) / 2, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out.update, out.hidden - u, rtol=1e-12, atol=1e-12)


@every_gate
@every_placement
def test_open_gate_is_the_coupling_alone(make: Make, gate: str, placement: str) -> None:
    sidecar, u = make(gate, placement), torch.randn(2, 5, 16)
    out = sidecar(u, gate_open=True)
    assert torch.equal(out.hidden, sidecar.coupling(u))
    assert torch.equal(out.gate, torch.ones(2, 5, 1))


@every_gate
@every_placement
@every_norm
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_gradients(make: Make, gate: str, placement: str, normalize: str, masked: bool) -> None:
    """Against finite differences, for the input and every parameter, of every output."""
    sidecar = make(gate, placement, normalize, torch.float64, width=6)
    names = [name for name, _ in sidecar.named_parameters()]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]) if masked else None
    u = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in sidecar.parameters()]

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, parameters, strict=True))
        return tuple(torch.func.functional_call(sidecar, named, (x, mask)))

    assert torch.autograd.gradcheck(run, (u, *values))
    out = run(u, *values)
    for name, grad in zip(names, torch.autograd.grad(sum(o.square().sum() for o in out), values), strict=True):
        assert grad.abs().max() > 0, name


@every_gate
@every_placement
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computes_in_its_own_dtype_and_returns_its_inputs(
    make: Make, gate: str, placement: str, input_dtype: torch.dtype
) -> None:
    sidecar = make(gate, placement, strength=0.3)
    u = torch.randn(3, 11, 16, dtype=torch.float64).to(input_dtype)
    out = sidecar(u, MASK)
    assert out.hidden.dtype == input_dtype
    assert out.gate.dtype == out.update.dtype == torch.float32
    exact = sidecar(u.float(), MASK)
    assert torch.equal(out.update, exact.update)
    if input_dtype != torch.float64:  # one rounding, at the very end
        assert torch.equal(out.hidden, exact.hidden.to(input_dtype))
    out.hidden.double().square().sum().backward()
    for name, parameter in sidecar.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), name


@every_gate
@every_placement
def test_says_whether_it_is_causal(make: Make, gate: str, placement: str) -> None:
    sidecar, u = make(gate, placement), torch.randn(2, 8, 16)
    later = u.clone()
    later[:, 5:] += 3
    same = torch.equal(sidecar(u).hidden[:, :5], sidecar(later).hidden[:, :5])
    assert same is sidecar.causal is (gate != "seq")


def test_refuses_an_odd_width() -> None:
    with pytest.raises(ValueError, match=r"15 is odd"):
        Sidecar(15, SidecarConfig())
