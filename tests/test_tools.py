"""The measuring tools: what they count is right, and the benchmark refuses to time a wrong step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def workload() -> Any:
    from bench_workload import Workload

    return Workload("tiny", 4, 2, 64, torch.float32)


@pytest.mark.parametrize("cached", [False, True])
def test_the_arithmetic_past_one_machine_is_what_torch_counts(
    tools: None, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    import scale_model
    from bench import flops_of
    from bench_peers import Ours

    for name, value in {"VOCABULARY": 211, "BLOCK": 64, "BOTTLENECK": 4}.items():
        monkeypatch.setattr(scale_model, name, value)
    ours = Ours(workload(), cached=cached)
    ours.step()
    assert flops_of(ours) == pytest.approx(scale_model.Shape(2, 32).step(4, 2, cached), rel=0.02)
    assert scale_model.Shape(2, 32).trained == sum(p.numel() for p in ours.patch.parameters())


def test_a_wrong_gradient_is_not_timed(tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_peers
    from bench import check

    ours = bench_peers.Ours(workload())
    assert check("ours", ours, torch.float32) < 1e-5
    right = ours.objective.forward
    monkeypatch.setattr(ours.objective, "forward", lambda *args: right(*args)._replace(loss=1.001 * right(*args).loss))
    with pytest.raises(SystemExit, match="No times are given"):
        check("ours", ours, torch.float32)


@pytest.mark.slow
def test_the_benchmark_ends_with_its_table_and_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(TOOLS / "bench.py"), "--shape=tiny", "--block=32", "--rounds=1", f"--json={file}"]
    done = subprocess.run([*command, "--peers=lora-lm,textbook-fp32"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = {figure["name"]: figure for figure in json.loads(file.read_text())["figures"]}
    assert figures["lora-lm / ours"]["measured"] > 0
    assert figures["lora-kl / ours"] == {
        "name": "lora-kl / ours",
        "asked": ">= 2",
        "measured": None,
        "unit": "times",
        "holds": False,
    }
    assert figures["relative gradient error, ours"]["measured"] < 1e-5
    assert "lora-lm / ours" in done.stdout


@pytest.mark.parametrize("weights", [{}, {"gate_l1_weight": 0.1}, {"gate_l1_weight": 0.1, "patch_l2_weight": 0.1}])
def test_steps_leave_nothing_in_memory(tools: None, weights: dict[str, float]) -> None:
    """What is recomputed in the backward pass was once never freed, if no gradient was asked of one of its outputs."""
    from bench import resident
    from bench_peers import Ours
    from bench_workload import Workload

    ours = Ours(Workload("demo", 4, 4, 128, torch.float32))
    ours.objective.config = ours.objective.config.model_copy(update=weights)
    sizes = []
    for _ in range(3):
        for _ in range(6):
            ours.step()
        sizes.append(resident("VmRSS"))
    assert sizes[-1] - sizes[0] < 60 * 2**20, f"grew by {(sizes[-1] - sizes[0]) / 2**20:.0f} MiB in 12 steps"
