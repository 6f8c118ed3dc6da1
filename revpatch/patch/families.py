"""The model families that can be patched: one row each, saying where the parts are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """Where a causal language model keeps its parts, as dotted paths from the model."""

    body: str
    """The module that maps token ids to the last hidden states."""
    blocks: str
    """The ModuleList of transformer blocks."""
    head: str = "lm_head"
    """The linear map from the last hidden states to logits."""


FAMILIES: dict[str, Family] = {
    "gpt2": Family(body="transformer", blocks="transformer.h"),
    "llama": Family(body="model", blocks="model.layers"),
    "qwen2": Family(body="model", blocks="model.layers"),
    "qwen3": Family(body="model", blocks="model.layers"),
}
"""By `model.config.model_type`."""


def family_of(model: nn.Module) -> Family:
    """Return the row of a model.

    Raises:
        ValueError: there is none; the message says how to add one.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise ValueError(
            f"no row for models of type {kind!r} (known: {', '.join(sorted(FAMILIES))}): add one to FAMILIES in "
            "revpatch/patch/families.py that says where the model keeps its body, its blocks and its head"
        )
    return FAMILIES[kind]


def body_of(model: nn.Module) -> nn.Module:
    """Return the module that maps token ids to the last hidden states (batch, time, d)."""
    return model.get_submodule(family_of(model).body)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Return the transformer blocks, first to last."""
    return cast(nn.ModuleList, model.get_submodule(family_of(model).blocks))


def blocks_within(model: nn.Module) -> Callable[[nn.Module], nn.ModuleList]:
    """Return what finds the blocks in the model's body, or in a copy's."""
    family = family_of(model)
    return attrgetter(family.blocks.removeprefix(f"{family.body}."))


def head_of(model: nn.Module) -> nn.Linear:
    """Return the head.

    Raises:
        ValueError: it is not a plain linear map without a bias, or the model scales or caps its logits.
    """
    head = model.get_submodule(family_of(model).head)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"the head is {head}: only a linear map without a bias is supported")
    for key in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        if getattr(model.config, key, None) not in (None, 1, 1.0):
            raise ValueError(
                f"the model's {key} = {getattr(model.config, key)}: scaled or capped logits are not supported"
            )
    return head


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Holds the logits of two tokens against the head's product with the last hidden states.

    Raises:
        ValueError: as `head_of`; or they differ, as the model does something to its logits under a name not known here.
    """
    head = head_of(model)
    last: list[Tensor] = []
    hook = body_of(model).register_forward_hook(lambda _, __, output: last.append(output[0]))
    try:
        ids = torch.tensor([[0, 1]], device=head.weight.device)
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        hook.remove()
    expected = head(last[0]).to(found.dtype)
    error, size = (found - expected).abs().max(), expected.abs().max()
    if not error <= torch.finfo(head.weight.dtype).eps * size:  # of one product made twice
        raise ValueError(
            f"the model's logits are not its head's product with the last hidden states (they differ by up to "
            f"{float(error):.3g}, and are up to {float(size):.3g}): scaled, capped or shifted logits are not supported"
        )


def width_of(model: nn.Module) -> int:
    """d, the width of the residual stream."""
    return int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
