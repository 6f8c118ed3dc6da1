"""Batches of token ids for tests of tiny models."""

from __future__ import annotations

import torch
from torch import Tensor


def left_padded(time: int = 12) -> tuple[Tensor, Tensor]:
    """Ids and mask of three rows, two of them padded on the left."""
    ids = torch.randint(3, 61, (3, time), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask
