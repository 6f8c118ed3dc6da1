"""What training costs: operations counted by the profiler of torch, memory by the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy import Toy, make_base

from revpatch.config import SidecarConfig
from revpatch.patch.patched_model import attach
from revpatch.train.startup import flops_a_token, memory_in_use, peak_of, peak_tflops


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
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce GTX 1080 Ti", None),
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


def test_memory_is_what_the_process_has() -> None:
    before = memory_in_use(torch.device("cpu"))
    kept = torch.ones(50_000_000)
    assert 1.9e8 < memory_in_use(torch.device("cpu")) - before < 2.5e8
    del kept
