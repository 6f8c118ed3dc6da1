"""What the tests of patched models share: parameters, tolerances, tokens and calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import make_it_look_trained
from transformers.cache_utils import DynamicCache

from revpatch.config import SidecarConfig
from revpatch.patch.families import FAMILIES
from revpatch.patch.gates import GATES

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
every_gate = pytest.mark.parametrize("gate", sorted(GATES))
every_placement = pytest.mark.parametrize("placement", ["residual", "coupled"])
every_norm = pytest.mark.parametrize("normalize", ["channels", "rms", "none"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
every_causal_gate = pytest.mark.parametrize("gate", ["prefix", "token"])

ROUNDING = 2e-5
"""Logits of a few units after three blocks in float32, summed in another order: 2⁻²³ · 5 · a few dozen sums."""
TOLERANCE = 1e-5
"""Logits with a cache and without."""

Build = Callable[..., Any]
trained = make_it_look_trained


def knobs(**changes: Any) -> SidecarConfig:
    """Knobs with a small bottleneck."""
    return SidecarConfig.model_validate({"bottleneck": 4, **changes})


def some_ids(rows: int = 2, time: int = 9, seed: int = 5) -> Tensor:
    """Return (rows, time) token ids, none of them special."""
    return torch.randint(3, 61, (rows, time), generator=torch.Generator().manual_seed(seed))


def left_padded(time: int = 12) -> tuple[Tensor, Tensor]:
    """Return ids and mask of three rows, two of them padded on the left."""
    ids = some_ids(3, time, seed=7)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def largest(a: Tensor, b: Tensor) -> float:
    """Return the largest difference."""
    return (a - b).abs().max().item()


@torch.no_grad()
def logits(model: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    """The logits without a cache, with positions counted over real tokens only."""
    if mask is not None:
        more.setdefault("position_ids", (mask.long().cumsum(1) - 1).clamp(min=0))
    out: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
    return out


@torch.no_grad()
def in_chunks(
    model: Any, ids: Tensor, mask: Tensor | None, cuts: list[int], cache: Any = None, places: int = 0
) -> Tensor:
    """The logits of (rows, time) ids in calls of so many tokens each, with a cache between them; the mask of each call
    has zeros up to so many places."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    padded = mask is not None and mask.dim() == 2
    parts, done = [], 0
    for cut in cuts:
        here = slice(done, done + cut)
        more = {} if mask is None else {"attention_mask": mask[:, : here.stop]}
        if mask is not None and padded:
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, here]
            more["attention_mask"] = nn.functional.pad(mask[:, : here.stop], (0, max(places - here.stop, 0)))
        parts.append(model(ids[:, here], past_key_values=cache, use_cache=True, **more).logits)
        done += cut
    return torch.cat(parts, 1)
