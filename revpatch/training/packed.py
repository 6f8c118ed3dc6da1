"""The last hidden states of packed blocks, without a mask and without the host waiting for the device.

Blocks are full: no token is padding, and positions count from zero in each row. Left to itself, transformers looks at
every batch's positions to see whether several texts share a row, which makes the host wait for a GPU in each forward
pass. Under an attention of its own name that has no mask function it builds none and looks at nothing, and the
attention kernel is told to be causal, which is its fused path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from revpatch.patch.families import body_of

MASKLESS = ("sdpa", "flash_attention_2", "flash_attention_3")
"""Attention implementations that are causal by themselves when they get no mask."""
_PREFIX = "revpatch_packed_"


def last_hidden_states(base: nn.Module, tokens: Tensor) -> Tensor:
    """The body's output, after the final norm: (rows, time) int64 to (rows, time, d).

    Args:
        base: a causal language model, patched or not.
        tokens: full blocks; with padding among them the result would be wrong.
    """
    with _no_mask(base):
        states: Tensor = body_of(base)(tokens, use_cache=False).last_hidden_state
    return states


@contextlib.contextmanager
def _no_mask(base: nn.Module) -> Iterator[None]:
    config: Any = base.config
    found = config._attn_implementation
    if found not in MASKLESS or _slides(config):  # these need their masks, and get them at the price of a wait
        yield
        return
    name = _PREFIX + found
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, AttentionInterface._global_mapping[found])
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = found


def _slides(config: Any) -> bool:
    """Whether some layer attends to a window only."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None
