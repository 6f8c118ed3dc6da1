"""Which tokens of a call are padding, read off the attention mask on its way into the body."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticCache

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""By these a call says that a row holds several sequences: `generate_batch` does, and collators that pack."""


class PaddingReader:
    """Finds the padding mask of a call of `body` from the arguments of its forward."""

    def __init__(self, body: nn.Module) -> None:
        self.names = list(inspect.signature(body.forward).parameters)
        self.window: int | None = getattr(body.config, "sliding_window", None)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """(batch, now), not 0 for real tokens; None if the call says nothing of padding.

        Raises:
            ValueError: the mask says more than which tokens are padding, or a row holds several sequences; by
                position_ids, that is where they begin anew among real tokens.
        """
        given = dict(zip(self.names, args, strict=False)) | kwargs
        for key in PACKED:
            if given.get(key) is not None:
                _refuse_packed(key)
        mask, inputs = given.get("attention_mask"), given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return None
        now, cache = inputs.shape[1], given.get("past_key_values")
        positions = given.get("position_ids")
        if now == 1 or not isinstance(positions, Tensor) or positions.dim() not in (1, 2):
            positions = None
        elif positions.dim() == 1:  # of all rows, as GPT-2 takes them
            positions = positions[None]
        if mask is None:
            # Without a mask and a cache transformers takes every step other than 1 for the beginning of a sequence.
            if positions is not None and bool(
                (positions.diff() <= 0 if cache is not None else positions.diff() != 1).any()
            ):
                _refuse_packed("position_ids")
            return None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
            # As long as a cache with empty places: what follows this call's tokens says nothing of them.
            mask = mask[:, past : past + now] if mask.shape[1] > past + now else mask[:, -now:]
            if now > 1 and bool(((mask != 0) & (mask != 1)).any()):
                _refuse_packed("attention_mask (with other numbers than 0 and 1)")
            if positions is not None:
                real = mask.to(positions.device) != 0
                if bool(((positions.diff() <= 0) & real[:, 1:] & real[:, :-1]).any()):
                    _refuse_packed("position_ids")
            return mask
        if not isinstance(cache, StaticCache):
            _refuse(mask)
        # What `generate` makes of a padding mask for a cache of this kind, before the body is called.
        past = int(cache.get_seq_length())
        if not isinstance(mask, dict):
            return _of_pairs(mask, past, now, now)
        if "full_attention" in mask:
            pairs, first, window = mask["full_attention"], past, now
        elif "sliding_attention" in mask and self.window is not None:
            _, forgotten = cache.get_mask_sizes(now, cache.is_sliding.index(True))
            pairs, first, window = mask["sliding_attention"], past - forgotten, self.window
        else:
            _refuse(mask)
        return None if pairs is None else _of_pairs(pairs, first, now, window)


def _of_pairs(mask: Tensor, first: int, now: int, window: int) -> Tensor:
    """Return the padding mask that a causal mask (batch, 1, now, keys) was made of, whose key `first` is the first
    token's; ValueError if it was made of more."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        _refuse(mask)
    seen = mask[:, 0, :, first : first + now]
    seen = seen if seen.dtype == torch.bool else seen >= 0
    real = seen.diagonal(dim1=1, dim2=2)  # a token sees itself, unless it is padding
    causal = torch.ones(now, now, dtype=torch.bool, device=seen.device).tril().triu(1 - window) & real[:, None, :]
    if bool(((seen != causal) & real[:, :, None]).any()):
        _refuse(mask)
    return real


def _refuse_packed(key: str) -> NoReturn:
    raise ValueError(
        f"{key} says that a row holds several sequences, and a prefix or seq gate would average over them all: call "
        "generate instead of generate_batch, give each sequence a row of its own, or train with gate: token"
    )


def _refuse(mask: object) -> NoReturn:
    raise ValueError(
        f"the gates need a padding mask of shape (batch, time), found {getattr(mask, 'shape', type(mask))}: pass a "
        "two-dimensional attention_mask, or none for packed blocks"
    )
