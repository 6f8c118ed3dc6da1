"""The learning rate over a phase, and what of it each parameter gets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from revpatch.config import OptimizerConfig, SidecarConfig
from revpatch.patch.patched_model import Patch
from revpatch.step.engine import learning_rate, make_optimizer, set_learning_rate


def rates(steps: int, **knobs: Any) -> list[float]:
    config = OptimizerConfig(**knobs)
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


def test_the_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert rates(50, lr=2.0, warmup_steps=4, schedule="constant")[:6] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_the_cosine_ends_at_zero_with_the_last_step() -> None:
    found = rates(12, lr=3.0, warmup_steps=2)
    assert found[1] == 3.0
    assert found[6] == pytest.approx(1.5), "half way between step 2 and step 12"
    assert found[4] == pytest.approx(1.5 * (1 + math.cos(math.pi * 0.3)))
    assert found[-1] == pytest.approx(0.0, abs=1e-15)


def test_without_warm_up_the_first_step_is_near_the_peak() -> None:
    found = rates(100, lr=1.0, warmup_steps=0)
    assert 0.999 < found[0] < 1.0
    assert rates(3, lr=1.0, warmup_steps=0, schedule="constant") == [1.0, 1.0, 1.0]


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 299),
    lr=st.floats(1e-6, 10.0),
    kind=st.sampled_from(["cosine", "constant"]),
)
def test_the_rate_rises_to_the_peak_and_never_rises_again(steps: int, warmup: int, lr: float, kind: Any) -> None:
    warmup = min(warmup, steps - 1)
    found = rates(steps, lr=lr, warmup_steps=warmup, schedule=kind)
    assert all(0.0 <= rate <= lr for rate in found)
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert all(rate > 0 for rate in found[:-1])


@pytest.fixture(params=["residual", "coupled"])
def patch(request: pytest.FixtureRequest) -> Patch:
    return Patch(8, 3, SidecarConfig(bottleneck=2, placement=request.param))


def settings_of(optimizer: torch.optim.Optimizer, patch: Patch) -> dict[str, dict[str, Any]]:
    """The group of each parameter, by the parameter's name; every parameter is in one group alone."""
    names = {parameter: name for name, parameter in patch.named_parameters()}
    pairs = [(names[p], group) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in pairs) == sorted(names.values())
    return dict(pairs)


def test_gates_learn_at_their_own_rate_and_scales_and_gates_do_not_decay(patch: Patch) -> None:
    optimizer = make_optimizer(patch, OptimizerConfig(lr=0.5, gate_lr=1.5, weight_decay=0.25))
    set_learning_rate(optimizer, 0.125)
    for name, group in settings_of(optimizer, patch).items():
        gate, scale = ".gates." in name, name.endswith("log_scale")
        assert group["lr"] == (0.375 if gate else 0.125), name
        assert group["weight_decay"] == (0.0 if gate or scale else 0.25), name
        assert gate or scale or ".coupling.f." in name or ".coupling.g." in name


def test_the_knobs_reach_the_optimizer_in_every_group(patch: Patch) -> None:
    optimizer = make_optimizer(patch, OptimizerConfig(betas=[0.7, 0.8]))
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-8)


def test_a_step_moves_each_parameter_by_its_rate(patch: Patch) -> None:
    """Adam's first step has the size of the rate, whatever the gradient."""
    optimizer = make_optimizer(patch, OptimizerConfig(lr=0.5, gate_lr=2.0, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in patch.named_parameters()}
    for p in patch.parameters():
        p.grad = torch.full_like(p, 7.0)
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    for name, p in patch.named_parameters():
        gate, scale = ".gates." in name, name.endswith("log_scale")
        decayed = before[name] * (1.0 if gate or scale else 1 - 0.01 * 0.1)
        torch.testing.assert_close(
            decayed - p.detach(), torch.full_like(p, 0.04 if gate else 0.01), rtol=1e-4, atol=1e-7
        )
