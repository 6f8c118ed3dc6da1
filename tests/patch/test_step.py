"""A step of one token is what the sidecar computes, and knows when the sidecar's memory has moved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from revpatch.config import SidecarConfig
from revpatch.patch.coupling import ACTIVATIONS
from revpatch.patch.cpu_decode import step
from revpatch.patch.patched_model import attach
from revpatch.patch.sidecar import Sidecar

Build = Callable[..., nn.Module]
Randomize = Callable[..., Any]


@pytest.fixture
def sidecar(randomize: Randomize) -> Callable[..., Any]:
    return lambda width=32, **knobs: randomize(Sidecar(width, SidecarConfig(bottleneck=8, gate="token", **knobs)))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("normalize", ["channels", "rms", "none"])
@pytest.mark.parametrize("placement", ["residual", "coupled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_step_is_the_sidecar(
    sidecar: Callable[..., Any], activation: str, normalize: str, placement: str, dtype: torch.dtype
) -> None:
    """In the sidecar's precision; on a bfloat16 base, to the one rounding at the end."""
    one = sidecar(activation=activation, normalize=normalize, placement=placement)
    if dtype == torch.float64:
        one.double()
    for scale in (1e-4, 1.0, 300.0):
        u = (scale * torch.randn(1, 1, 32)).to(dtype)
        found, expected = step(one, u, None, 0), one(u).hidden
        assert found.dtype == dtype and found.shape == u.shape
        eps = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
        assert (found - expected).abs().max() <= eps * (1 + expected.abs().max())


@torch.no_grad()
def test_what_is_not_a_number_stays_so_in_silence(
    sidecar: Callable[..., Any], recwarn: pytest.WarningsRecorder
) -> None:
    for value in (float("inf"), float("nan")):
        assert not step(sidecar(), torch.full((1, 1, 32), value), None, 0).isfinite().all()
    assert not recwarn.list


@torch.no_grad()
def test_a_step_sees_weights_that_change_move_or_are_replaced(sidecar: Callable[..., Any]) -> None:
    one, u = sidecar(), torch.randn(1, 1, 32)
    before = step(one, u, None, 0)

    def in_place(sidecar: Any) -> None:
        sidecar.coupling.g.up.bias.add_(1)

    def other_memory(sidecar: Any) -> None:
        sidecar.coupling.f.down.weight.data = torch.zeros(8, 16)

    def another(sidecar: Any) -> None:
        sidecar.gates[0].bias = nn.Parameter(torch.full((1,), 3.0))

    for change in (in_place, other_memory, another):
        twin = copy.deepcopy(one)
        assert torch.equal(step(twin, u, None, 0), before)
        change(twin)
        assert (step(twin, u, None, 0) - twin(u).hidden).abs().max() <= 1e-5
        assert not torch.equal(step(twin, u, None, 0), before)
    assert torch.equal(step(one, u, None, 0), before)


def test_where_a_step_may_stand_in(sidecar: Callable[..., Any]) -> None:
    one, u = sidecar(), torch.randn(1, 1, 32)
    assert step(one, u, None, 0) is None, "gradients are asked for"
    with torch.no_grad():
        assert step(one, u, None, 0) is not None
        assert step(one, torch.randn(2, 1, 32), None, 0) is None
        assert step(one, torch.randn(1, 2, 32), None, 0) is None
        assert step(one.bfloat16(), u, None, 0) is None


def test_decoding_takes_steps(build: Build, randomize: Randomize, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check on the checks of decoding: with steps that are wrong, the logits are."""
    model: Any = build("gpt2")
    randomize(attach(model, SidecarConfig(bottleneck=4)))
    cache, ids = DynamicCache(config=model.config), torch.tensor([[5, 6, 7]])

    def last(cut: int) -> Tensor:
        with torch.no_grad():
            model(ids[:, :cut], past_key_values=cache)
            return model(ids[:, cut:], past_key_values=cache).logits[:, -1]

    right = last(2)
    monkeypatch.setattr("revpatch.patch.block.step", lambda _, u, *__: u if u.shape[1] == 1 else None)
    cache.reset()
    assert (last(2) - right).abs().max() > 0.1
