"""What a GPU has to get right; the same tests run on the CPU too, so that they are known to run.

Run on a GPU by `python -m pytest -m gpu tests/test_gpu.py`, and by tools/gpu_check.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import make_base, make_it_look_trained
from transformers import DynamicCache

from revpatch.config import SidecarConfig
from revpatch.patch.patched_model import attach, detach, patch_disabled
from revpatch.step.head_loss import compiled, frozen_head_loss, in_place
from revpatch.step.teacher import TeacherCache

PARTS = Path(__file__).resolve().parent.parent / "tools/gpu_parts.py"
VOCABULARY = 300

on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """Products of float32 without TF32, whatever a test before this one chose."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def patched(device: str, dtype: torch.dtype = torch.float32, **knobs: Any) -> Any:
    base = make_base(VOCABULARY).to(device, dtype)
    make_it_look_trained(attach(base, SidecarConfig(bottleneck=8, **knobs)))
    return base


def some_ids(device: str, rows: int = 2, time: int = 24) -> Tensor:
    return torch.randint(VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(3)).to(device)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_base_is_what_it_was_to_the_bit(device: str, dtype: torch.dtype) -> None:
    base, ids = make_base(VOCABULARY).to(device, dtype), some_ids(device)
    with torch.no_grad():
        before = base(ids).logits
        make_it_look_trained(attach(base, SidecarConfig(bottleneck=8)))
        assert not torch.equal(base(ids).logits, before)
        with patch_disabled(base):
            assert torch.equal(base(ids).logits, before)
        detach(base)
        assert torch.equal(base(ids).logits, before)


@on_each_device
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("way", ["in_place", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_heads_loss_is_that_of_float64(device: str, temperature: float, way: str, dtype: torch.dtype) -> None:
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    generator = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(70, 32, generator=generator).to(device, dtype) for _ in range(2))
    head = (0.3 * torch.randn(VOCABULARY, 32, generator=generator)).to(device, dtype)
    targets = torch.randint(VOCABULARY, (70,), generator=generator).to(device)
    chunk = in_place if way == "in_place" else compiled("inductor" if device == "cuda" else "aot_eager")
    hidden.requires_grad_()
    loss, *_ = frozen_head_loss(hidden, targets, head, taught, 0.7, 1.3, temperature, 4 * VOCABULARY * 32, chunk=chunk)
    (gradient,) = torch.autograd.grad(loss, hidden)

    wide = hidden.detach().double().requires_grad_()
    q, p = ((x @ head.double().T) for x in (wide, taught.double()))
    nll = -q.log_softmax(-1).gather(-1, targets[:, None]).mean()
    p, q = (x.div(temperature).log_softmax(-1) for x in (p, q))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    expected = 0.7 * nll + 1.3 * temperature**2 * kl
    (right,) = torch.autograd.grad(expected, wide)
    assert abs(float((loss / expected).detach()) - 1) < limit
    assert float((gradient.double() - right).norm() / right.norm()) < limit


@on_each_device
@pytest.mark.parametrize("cached", [False, True], ids=["teacher", "cache"])
def test_steps_are_those_of_a_cpu(device: str, cached: bool) -> None:
    """Three optimizer steps in float32 leave the same patch, but for what sums in another order."""
    from bench_ours import Ours
    from bench_workload import Workload

    after = []
    for place in ("cpu", device):
        ours = Ours(Workload("tiny", 4, 2, 64, torch.float32, device=place), cached=cached)
        before = torch.cat([p.detach().flatten().cpu() for p in ours.trainable()])
        losses = [float(ours.step()) for _ in range(3)]
        moved = torch.cat([p.detach().flatten().cpu() for p in ours.trainable()]) - before
        after.append((losses, moved))
    (losses, moved), (found, also) = after
    assert found == pytest.approx(losses, rel=1e-5)
    assert float((also - moved).norm() / moved.norm()) < 1e-2  # Adam makes a sign of gradients near zero


@on_each_device
@pytest.mark.parametrize("placement", ["residual", "coupled"])
@pytest.mark.parametrize("gate", ["prefix", "token"])
def test_text_is_written_as_without_a_cache(device: str, gate: str, placement: str) -> None:
    model, ids = patched(device, gate=gate, placement=placement), some_ids(device)
    ids[0, :5] = 0
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        past, parts = DynamicCache(config=model.config), []
        for first, last in ((0, 8), *((t, t + 1) for t in range(8, ids.shape[1]))):
            knobs = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
            parts.append(model(ids[:, first:last], past_key_values=past, use_cache=True, **knobs).logits)
    real = mask.bool()
    assert float((torch.cat(parts, 1) - whole)[real].abs().max()) < 1e-3


@on_each_device
def test_the_teachers_cache_gives_back_what_it_was_given(device: str) -> None:
    """On a GPU it is copied to pinned memory and back beside the computation, which overwrites its source."""
    cache, generator = TeacherCache(10**8), torch.Generator().manual_seed(0)
    kept = [torch.randn(1, 512, 256, generator=generator).bfloat16() for _ in range(8)]
    for number, states in enumerate(kept):
        there = states.to(device, copy=True)
        cache.put(("set", number), (there,))
        there.zero_()
    for number, states in enumerate(kept):
        found = cache.get(("set", number), torch.device(device))
        assert found is not None
        assert found[0].device.type == device
        assert torch.equal(found[0].cpu(), states)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What the part `sync` of gpu_check.py finds on a device, by name; in a process of its own, which has the ranks."""

    @cache
    def found(device: str) -> dict[str, Any]:
        file = tmp_path_factory.mktemp(device) / "figures.json"
        command = [sys.executable, str(PARTS), "sync", f"--device={device}", f"--json={file}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return {row["name"]: row for row in json.loads(file.read_text())["figures"]}

    return found


@on_each_device
@pytest.mark.parametrize("engine", ["deepspeed", "accelerate"])
def test_a_step_waits_for_nothing_and_a_rollback_is_exact(
    engines: Callable[[str], dict[str, Any]], device: str, engine: str
) -> None:
    found = engines(device)
    assert found[f"waits in a step, {engine}"]["measured"] == "none"
    assert found[f"waits in a step, {engine}, with the teacher’s cache"]["measured"] == "none"
    assert found[f"after a rollback, {engine}"]["holds"]
