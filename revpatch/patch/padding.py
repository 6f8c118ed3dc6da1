"""Which tokens of a call are padding, read off the attention mask on its way into the body."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache


class PaddingReader:
    """Finds the padding mask of a call of `body` from the arguments of its forward."""

    def __init__(self, body: nn.Module) -> None:
        self.names = list(inspect.signature(body.forward).parameters)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """(batch, now), not 0 for real tokens; None if the call says nothing of padding.

        Raises:
            ValueError: the mask says more than which tokens are padding.
        """
        given = dict(zip(self.names, args, strict=False)) | kwargs
        mask, inputs = given.get("attention_mask"), given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if mask is None or inputs is None:
            return None
        now = inputs.shape[1]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask[:, -now:]
        cache = given.get("past_key_values")
        if not isinstance(cache, StaticCache):
            _refuse(mask)
        # What `generate` makes of a padding mask for a cache of this kind, before the body is called.
        pairs = mask.get("full_attention") if isinstance(mask, dict) else mask
        return None if pairs is None else _of_pairs(pairs, int(cache.get_seq_length()), now)


def _of_pairs(mask: Tensor, past: int, now: int) -> Tensor:
    """The padding mask that a causal mask (batch, 1, now, keys) was made of; ValueError if it was made of more."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        _refuse(mask)
    seen = mask[:, 0, :, past : past + now]
    seen = seen if seen.dtype == torch.bool else seen >= 0
    real = seen[:, -1]
    causal = torch.ones(now, now, dtype=torch.bool, device=seen.device).tril() & real[:, None, :]
    if bool(((seen != causal) & real[:, :, None]).any()):
        _refuse(mask)
    return real


def _refuse(mask: object) -> NoReturn:
    raise ValueError(
        f"the gates need a padding mask of shape (batch, time), found {getattr(mask, 'shape', type(mask))}: pass a "
        "two-dimensional attention_mask, or none for packed blocks"
    )
