"""The sidecar over every gate, placement and norm: formula, inverse, gradients, dtypes, channels, one token by NumPy.

Tolerances are counted in machine epsilons of the dtype in which h and u are held, relative to each token's size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from patching import Build, every_family, every_gate, every_norm, every_placement, knobs, some_ids, trained
from torch import Tensor, nn

from revpatch.config import SidecarConfig
from revpatch.patch.channels import SMALLEST, measure_channels
from revpatch.patch.coupling import ACTIVATIONS
from revpatch.patch.cpu_decode import step
from revpatch.patch.families import blocks_of
from revpatch.patch.patched_model import attach, patch_state
from revpatch.patch.sidecar import Sidecar

DTYPES = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)]
"""Of the sidecar and of the stream."""
MASK = torch.ones(3, 11, dtype=torch.long)
MASK[0, :4] = 0
MASK[1, 9:] = 0


def make(
    gate: str,
    placement: str,
    normalize: str = "rms",
    dtype: torch.dtype = torch.float32,
    strength: float = 1.0,
    width: int = 16,
    seed: int = 1,
    **more: Any,
) -> Any:
    """Make a sidecar with random weights."""
    config = knobs(bottleneck=5, gate=gate, placement=placement, normalize=normalize, **more)
    return trained(Sidecar(width, config).to(dtype), seed, strength)


def stream(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, 16, dtype=torch.float64).to(dtype)


def _error(found: Tensor, u: Tensor, h: Tensor) -> float:
    """In epsilons of u's dtype, the largest over tokens."""
    size = torch.maximum(u.abs().amax(-1), h.abs().amax(-1))
    return ((found.double() - u.double()).abs().amax(-1) / size).max().item() / torch.finfo(u.dtype).eps


@every_gate
@every_placement
@every_norm
def test_a_sidecar_is_inverted(gate: str, placement: str, normalize: str) -> None:
    """Iteration stops at a residual of 16 eps, so the error is 16 / (1 − L): 64 while the Lipschitz constant is ≤ 3/4.

    The closed form makes six roundings, amplified by less than 3 while shifts are half of the stream. With bfloat16 in
    and out the roundings of h and u to bfloat16, half an eps each, dwarf that: (1/2) / (1 − L) + 1/2.
    """
    coupled, changes = placement == "coupled", []
    for dtype, input_dtype in DTYPES:
        for seed in range(4):
            sidecar = make(gate, placement, normalize, dtype, 0.5 if coupled else 0.3, seed=seed)
            u = stream(3, 11, dtype=input_dtype)
            h = sidecar(u, MASK).hidden
            changes.append((h - u).abs().max().item())
            result = sidecar.inverse(h, MASK)
            assert result.converged
            assert result.iterations == 0 if coupled else 1 <= result.iterations < 100
            assert result.residual <= 16 * torch.finfo(dtype).eps
            assert result.hidden.dtype == input_dtype
            bound = 18 if coupled else 64
            assert _error(result.hidden, u, h) <= (2.5 if input_dtype == torch.bfloat16 else bound)
        for strength in (4.0, 64.0) if coupled and input_dtype == dtype else ():
            sidecar, u = make(gate, placement, normalize, dtype, strength), stream(1, 1, dtype=dtype)
            h = sidecar(u).hidden
            missed, size = (sidecar.inverse(h).hidden - u).abs().max().item(), torch.maximum(h.abs(), u.abs()).max()
            assert missed <= 16 * torch.finfo(dtype).eps * _conditioning(sidecar.double(), u.double()) * size
    assert max(changes) > 0.1


def _conditioning(sidecar: Any, u: Tensor) -> float:
    """Return how much larger an error of h may be in u: the norm of the inverse of the map's Jacobian, float64."""
    jacobian = torch.autograd.functional.jacobian(lambda x: sidecar(x).hidden, u).reshape(u.numel(), u.numel())
    return float(torch.linalg.inv(jacobian).abs().sum(1).max())


def _hold_gates(sidecar: Any, bias: float) -> Any:
    with torch.no_grad():
        for gate in sidecar.gates:
            gate.weight.zero_()
            gate.bias.fill_(bias)
    return sidecar


@every_gate
def test_the_iteration_admits_that_it_did_not_converge(gate: str) -> None:
    """Where gates are wide open and updates many times the stream, or when told to give up."""
    for dtype, input_dtype in DTYPES:
        sidecar = _hold_gates(make(gate, "residual", "channels", dtype, strength=8.0), 5.0)
        result = sidecar.inverse(sidecar(stream(3, 11, dtype=input_dtype)).hidden)
        assert not result.converged
        assert not result.residual < 1e-3  # nan, once it has overflowed, is admitted too
        assert result.iterations <= 200
    sidecar = make(gate, "residual", dtype=torch.float64, strength=0.3)
    h = sidecar(stream(2, 5)).hidden
    early, rough = sidecar.inverse(h, max_iterations=2), sidecar.inverse(h, tolerance=1e-3)
    assert (early.converged, early.iterations) == (False, 2)
    assert rough.converged and 1e-12 < rough.residual <= 1e-3
    assert rough.iterations < sidecar.inverse(h).iterations


@every_placement
def test_an_inverse_measures_each_token_by_itself(placement: str) -> None:
    """Norms in a residual stream differ by orders of magnitude; and what is no number does not converge."""
    sidecar = _hold_gates(make("token", placement, strength=8.0), 3.0)
    u = stream(1, 2, dtype=torch.float32)
    u[0, 0] *= 1e9
    h = sidecar(u).hidden
    result = sidecar.inverse(h)
    lost = (sidecar(result.hidden).hidden - h)[0, 1].abs().max() / h[0, 1].abs().max()
    assert result.converged is (lost.item() < 1e-4) is (placement == "coupled")
    h[0, 1, 3] = float("nan")
    result = sidecar.inverse(h)
    assert not result.converged and result.residual != result.residual


@every_gate
@every_placement
@every_norm
def test_a_sidecar_is_the_formula(gate: str, placement: str, normalize: str) -> None:
    sidecar = make(gate, placement, normalize, torch.float64)
    u = stream(3, 11)
    out, c, gates = sidecar(u, MASK), sidecar.coupling, sidecar.gates
    size = torch.ones(16, dtype=torch.float64) if sidecar.channels is None else sidecar.channels
    x = u / size
    if placement == "residual":
        g = gates[0](c.norm(x), MASK)
        expected = u + g * size * (c(x) - x)
    else:
        a, b = x[..., :8], x[..., 8:]
        first = gates[0](c.norm(b), MASK)
        a = a + first * c.scale * c.f(c.norm(b))
        second = gates[1](c.norm(a), MASK)
        b = b + second * c.scale * c.g(c.norm(a))
        assert (first - second).abs().max() > 0.1
        g, expected = (first + second) / 2, size * torch.cat([a, b], -1)
    torch.testing.assert_close(out.gate, g, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out.hidden, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out.update, out.hidden - u, rtol=1e-12, atol=1e-12)
    opened = sidecar(u, gate_open=True)
    torch.testing.assert_close(opened.hidden, size * c(x), rtol=1e-13, atol=1e-13)
    assert torch.equal(opened.gate, torch.ones_like(opened.gate))


@every_gate
@every_placement
@every_norm
def test_gradients(gate: str, placement: str, normalize: str) -> None:
    """Against finite differences, for the input and every parameter, of every output."""
    sidecar = make(gate, placement, normalize, torch.float64, width=6)
    names = [name for name, _ in sidecar.named_parameters()]
    u = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in sidecar.parameters()]
    for mask in (None, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])):

        def run(x: Tensor, *parameters: Tensor, mask: Tensor | None = mask) -> tuple[Tensor, ...]:
            named = dict(zip(names, parameters, strict=True))
            return tuple(torch.func.functional_call(sidecar, named, (x, mask)))

        assert torch.autograd.gradcheck(run, (u, *values), fast_mode=True)
        out = run(u, *values)
        for name, grad in zip(names, torch.autograd.grad(sum(o.square().sum() for o in out), values), strict=True):
            assert grad.abs().max() > 0, name


@every_gate
@every_placement
def test_a_sidecar_computes_in_its_own_dtype_and_returns_its_inputs(gate: str, placement: str) -> None:
    sidecar = make(gate, placement, strength=0.3)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        u = stream(3, 11, dtype=dtype)
        out, exact = sidecar(u, MASK), sidecar(u.float(), MASK)
        assert out.hidden.dtype == dtype
        assert out.gate.dtype == out.update.dtype == torch.float32
        assert torch.equal(out.update, exact.update)
        if dtype != torch.float64:  # one rounding, at the very end
            assert torch.equal(out.hidden, exact.hidden.to(dtype))
        sidecar.zero_grad()
        out.hidden.double().square().sum().backward()
        for name, parameter in sidecar.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@every_gate
@every_placement
def test_a_sidecar_says_whether_it_is_causal(gate: str, placement: str) -> None:
    sidecar, u = make(gate, placement), torch.randn(2, 8, 16)
    later = u.clone()
    later[:, 5:] += 3
    same = torch.equal(sidecar(u).hidden[:, :5], sidecar(later).hidden[:, :5])
    assert same is sidecar.causal is (gate != "seq")


@every_placement
@every_norm
@torch.no_grad()
def test_a_step_of_one_token_is_the_sidecar(placement: str, normalize: str) -> None:
    """In the sidecar's precision; on a bfloat16 base, to the one rounding at the end."""
    for activation in ACTIVATIONS:
        for dtype, eps in ((torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            one = make("token", placement, normalize, wide, activation=activation)
            for scale in (1e-4, 1.0, 300.0):
                u = (scale * torch.randn(1, 1, 16)).to(dtype)
                found, expected = step(one, u, None, 0), one(u).hidden
                assert found is not None and found.dtype == dtype and found.shape == u.shape
                assert (found - expected).abs().max() <= eps * (1 + expected.abs().max())


@torch.no_grad()
def test_a_step_sees_weights_that_change_move_or_are_replaced() -> None:
    one, u = make("token", "residual", "channels"), torch.randn(1, 1, 16)
    before = step(one, u, None, 0)

    changes: list[Callable[[Any], object]] = [
        lambda twin: twin.coupling.g.up.bias.add_(1),
        lambda twin: setattr(twin.coupling.f.down.weight, "data", torch.zeros(5, 8)),
        lambda twin: setattr(twin, "channels", 2 * twin.channels),
        lambda twin: setattr(twin.gates[0], "bias", nn.Parameter(torch.full((1,), 3.0))),
    ]
    for change in changes:
        twin = copy.deepcopy(one)
        assert torch.equal(step(twin, u, None, 0), before)
        change(twin)
        assert (step(twin, u, None, 0) - twin(u).hidden).abs().max() <= 1e-5
        assert not torch.equal(step(twin, u, None, 0), before)
    assert torch.equal(step(one, u, None, 0), before)


def test_where_a_step_may_stand_in(recwarn: pytest.WarningsRecorder) -> None:
    one, u = make("token", "residual"), torch.randn(1, 1, 16)
    assert step(one, u, None, 0) is None, "gradients are asked for"
    with torch.no_grad():
        assert step(one, u, None, 0) is not None
        for value in (float("inf"), float("nan")):
            assert not step(one, torch.full((1, 1, 16), value), None, 0).isfinite().all()
        assert not recwarn.list
        for shape in ((2, 1, 16), (1, 2, 16)):
            assert step(one, torch.randn(shape), None, 0) is None
        assert step(one.bfloat16(), u, None, 0) is None


@every_family
def test_channels_are_the_rms_of_the_blocks_outputs_without_the_first_token(build: Build, family: str) -> None:
    """Of the base alone, whatever patch is on."""
    model, ids = build(family), some_ids(6, 12)
    patch = trained(attach(model, knobs()))
    outputs: list[Tensor] = []
    hooks = [
        block.block.register_forward_hook(lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks_of(model)
    ]
    measure_channels(model, ids, 100)
    for hook in hooks:
        hook.remove()
    for rows in (1, 4):
        measure_channels(model, ids, rows)
        for layer in patch.layers:
            expected = outputs[layer][:, 1:].double().square().mean((0, 1)).sqrt()
            torch.testing.assert_close(patch.sidecar(layer).channels.double(), expected, rtol=1e-5, atol=0)


def test_a_silent_channel_is_not_divided_by_nothing(build: Build) -> None:
    model = build("gpt2")
    for block in model.transformer.h:
        for part in (block.attn.c_proj, block.mlp.c_proj):
            part.weight.data[:, 3] = 0
            part.bias.data[3] = 0
    model.transformer.wte.weight.data[:, 3] = 0
    model.transformer.wpe.weight.data[:, 3] = 0
    patch = attach(model, SidecarConfig(bottleneck=2))
    measure_channels(model, some_ids())
    for layer in patch.layers:
        channels = patch.sidecar(layer).channels
        assert channels[3] == pytest.approx(SMALLEST * float(channels.median()), rel=1e-5)


def test_what_channels_are_not_measured_of(patched: Build) -> None:
    model = patched("gpt2")
    for shape, words in (((3,), r"expected \(sequences, time\).*found \(3,\)"), ((3, 1), r"found \(3, 1\)")):
        with pytest.raises(ValueError, match=words):
            measure_channels(model, torch.zeros(shape, dtype=torch.long))
    model.transformer.h[1].mlp.c_fc.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="block 1"):
        measure_channels(model, some_ids())
    for normalize in ("rms", "none"):
        model = patched("gpt2", normalize=normalize)
        before = patch_state(model)
        measure_channels(model, some_ids())
        assert not any(name.endswith("channels") for name in before)
        assert all(torch.equal(value, before[name]) for name, value in patch_state(model).items())
