"""Arithmetic on patches: parameter by parameter in float64, rounded once, in the order of the names.

A patch is a nonlinear function of its parameters, so a difference or a mean of parameters is not one of functions:
what it does has to be measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

_LAST = (".up.weight", ".up.bias")
"""Ends of the names of F's and G's last projections: at zero, a sidecar is the identity, to the bit."""


def taken_out(newest: Tensors, after: Tensors, before: Tensors) -> Tensors:
    """newest − (after − before). If `newest` is `after`, this is `before` to the bit."""
    return {
        name: ((tensor.double() - after[name].double()) + before[name].double()).to(tensor.dtype)
        for name, tensor in newest.items()
    }


def weighted(patches: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """Σ weight·patch: a mean if the weights sum to 1, a sum if each is 1. The base's channels are the first patch's."""
    assert len(patches) == len(weights) > 0
    found = {}
    for name, tensor in patches[0].items():
        if name.endswith(".channels"):
            found[name] = tensor.clone()
            continue
        total = sum(weight * patch[name].double() for patch, weight in zip(patches, weights, strict=True) if weight)
        found[name] = torch.as_tensor(total).to(tensor.dtype).expand_as(tensor).contiguous()
    return found


def bypassed(patch: Tensors, layers: Iterable[int]) -> Tensors:
    """The patch with the sidecars after these blocks made the identity; shapes stay, and they can learn again.

    Raises:
        ValueError: there is no sidecar after one of the blocks.
    """
    wanted = set(layers)
    if missing := sorted(wanted - set(layers_of(patch))):
        raise ValueError(
            f"there is no sidecar after block {missing[0]}: the patch has sidecars after blocks {layers_of(patch)}"
        )
    return {
        name: torch.zeros_like(tensor) if _layer(name) in wanted and name.endswith(_LAST) else tensor.clone()
        for name, tensor in patch.items()
    }


def layers_of(patch: Tensors) -> list[int]:
    """The blocks that have a sidecar, in order."""
    return sorted({_layer(name) for name in patch})


def check_finite(patch: Tensors, what: str) -> None:
    """Raises ValueError, naming the tensor, if a value is infinite or not a number."""
    for name, tensor in patch.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what}: {name} holds values that are not finite, so it can't be used")


def _layer(name: str) -> int:
    return int(name.partition(".")[0])
