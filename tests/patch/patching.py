"""What the tests of patched models share: parameters, tolerances, tokens and calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from revpatch.config import SidecarConfig
from revpatch.patch.families import FAMILIES
from revpatch.patch.gates import GATES

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
every_gate = pytest.mark.parametrize("gate", sorted(GATES))
every_placement = pytest.mark.parametrize("placement", ["residual", "coupled"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
every_causal_gate = pytest.mark.parametrize("gate", ["prefix", "token"])

ROUNDING = 2e-5
"""Logits of a few units after three blocks in float32, summed in another order: 2⁻²³ · 5 · a few dozen sums."""
TOLERANCE = 1e-5

Build = Callable[..., nn.Module]
Logits = Callable[..., Tensor]
Config = Callable[..., SidecarConfig]
Randomize = Callable[..., Any]


def some_ids(rows: int = 2, time: int = 9, seed: int = 5) -> Tensor:
    """(rows, time)."""
    return torch.randint(3, 61, (rows, time), generator=torch.Generator().manual_seed(seed))


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return (a - b).abs().max().item()


def in_chunks(model: Any, ids: Tensor, mask: Tensor | None, cuts: list[int], cache: Any = None) -> Tensor:
    """The logits of (rows, time) ids in calls of so many tokens each, with a cache between them."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts, done = [], 0
    positions = None if mask is None or mask.dim() > 2 else (mask.cumsum(1) - 1).clamp(min=0)
    for cut in cuts:
        here = slice(done, done + cut)
        with torch.no_grad():
            out = model(
                ids[:, here],
                attention_mask=None if mask is None else mask[:, : here.stop],
                position_ids=None if positions is None else positions[:, here],
                past_key_values=cache,
                use_cache=True,
            )
        parts.append(out.logits)
        done += cut
    return torch.cat(parts, 1)
