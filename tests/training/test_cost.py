"""What training costs: operations counted by the profiler of torch, memory by the kernel."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from toy import make_base

from revpatch.config import SidecarConfig
from revpatch.patch.patched_model import attach
from revpatch.training.cost import flops_a_token, memory_in_use


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


def test_memory_is_what_the_process_has() -> None:
    before = memory_in_use(torch.device("cpu"))
    kept = torch.ones(50_000_000)
    assert 1.9e8 < memory_in_use(torch.device("cpu")) - before < 2.5e8
    del kept
