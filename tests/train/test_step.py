"""A step's rate, optimizer, clock and cost."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from toy import Toy, make_base

from revpatch.config import OptimizerConfig, SidecarConfig
from revpatch.patch.patched_model import Patch, attach
from revpatch.step.engine import Clock, learning_rate, make_optimizer, set_learning_rate
from revpatch.train.startup import choose_matmul_precision, flops_a_token, peak_of, peak_tflops


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


def test_operations_are_those_that_torch_counts_but_for_attention() -> None:
    base = make_base(300)
    patch = attach(base, SidecarConfig(bottleneck=8))
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        base(tokens).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op) and "bmm" not in str(op))
    expected = flops_a_token(base, patch) * tokens.numel()
    # The first block's input needs no gradient, so its 2·N backward operations are not made.
    first = 2 * tokens.numel() * sum(p.numel() for p in base.transformer.h[0].block.parameters() if p.dim() == 2)
    assert abs(products - (expected - first)) / expected < 0.02


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GB200", None),
    ],
)
def test_a_peak_is_that_of_this_very_device(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_the_peak_is_that_of_a_gpu_that_is_known(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    exact, rounded = (toy.config(tmp_path, base={"dtype": dtype}) for dtype in ("float32", "bfloat16"))
    assert [peak_of(rounded, device) for device in (cpu, gpu)] == [None, 362]
    assert peak_of(exact, gpu) is None, "the table's is bfloat16's"


def test_parts_add_up_and_an_inner_one_is_taken_out_of_the_outer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))

    def wait(seconds: float) -> None:
        now[0] += seconds

    for _ in range(2):
        with clock.part("backward"):
            wait(1.0)
            clock.timed("all_reduce", wait)(0.25)
            wait(1.0)
    with pytest.raises(RuntimeError), clock.part("optimizer"):
        wait(0.5)
        raise RuntimeError
    assert clock.take() == pytest.approx({"backward": 4.0, "all_reduce": 0.5, "optimizer": 0.5})
    assert clock.take() == {}


@pytest.mark.parametrize(
    ("device", "dtype", "chosen"),
    [
        ("cuda", "bfloat16", ["high"]),
        ("cuda", "float32", []),
        ("cpu", "bfloat16", []),
    ],
)
def test_tf32_is_for_sidecars_on_a_bfloat16_base_on_a_gpu(
    device: str, dtype: str, chosen: list[str], toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", found.append)
    config = toy.config(tmp_path, base={"dtype": dtype})
    choose_matmul_precision(config, torch.device(device))
    assert found == chosen
