"""What a patch's tensors say layer by layer, and how two patches differ, without a base model.

Names are those of an entry: `03.coupling...` belongs to the sidecar after block 3, `03.gates...` to its gates, and
`03.channels` holds the sizes of the block's channels in the base.

    norm      L2 norm of all weights of F and G
    cosine    between the weights of two patches; 1 is the same direction
    gate      what a gate is for a hidden state without any direction, σ(b); the mean of both when coupled
    scale     s = exp(log s)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from revpatch.ledger.patch_file import EntryError

if TYPE_CHECKING:
    from torch import Tensor

SAME_MAP = ("bottleneck", "activation", "normalize", "gate", "placement")
"""The knobs of a sidecar in which two patches must agree for their weights to mean the same; which blocks have one, the
names of the tensors say. The others say how training began or what was tested then."""

_SAME_CHANNELS = 0.01


@dataclass(frozen=True)
class LayerFacts:
    """One layer of a patch. `gate_weight` is ‖w‖, how far the hidden state moves the gate."""

    layer: int
    norm: float
    gate: float
    gate_weight: float
    scale: float


@dataclass(frozen=True)
class LayerDifference:
    """One layer of two patches; `distance` is the norm of the weights' difference. A cosine with zeros is None."""

    layer: int
    first: LayerFacts
    second: LayerFacts
    distance: float
    cosine: float | None


def layers_of(tensors: dict[str, Tensor]) -> list[LayerFacts]:
    """The facts of each layer, in order; tensors as an entry holds them. Raises EntryError for other tensors."""
    return [_facts(layer, named) for layer, named in sorted(_by_layer(tensors).items())]


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[LayerDifference]:
    """The layers of two patches that `check_comparable` has let pass."""
    ours, theirs = _by_layer(first), _by_layer(second)
    found = []
    for layer in sorted(ours):
        a, b = _weights(ours[layer]), _weights(theirs[layer])
        norms = float(a.norm()), float(b.norm())
        cosine = max(-1.0, min(1.0, float(a @ b) / (norms[0] * norms[1]))) if all(norms) else None
        facts = _facts(layer, ours[layer]), _facts(layer, theirs[layer])
        found.append(LayerDifference(layer, *facts, float((a - b).norm()), cosine))
    return found


def check_patch(name: str, metadata: dict[str, Any]) -> None:
    """Raises EntryError if an entry is something else than a patch, such as a snapshot."""
    if not isinstance(metadata.get("base"), dict) or not isinstance(metadata.get("sidecar"), dict):
        raise EntryError(f"{name}: expected metadata of a base and a sidecar, found none: not a patch")


def check_comparable(names: tuple[str, str], metadata: tuple[Any, Any], tensors: tuple[Any, Any]) -> None:
    """Raises EntryError unless both are patches of one base and one shape; the message says what differs."""
    for name, found in zip(names, metadata, strict=True):
        check_patch(name, found)
    bases, sidecars = ([found[key] for found in metadata] for key in ("base", "sidecar"))
    families = [base.get("family") for base in bases]
    if all(families) and families[0] != families[1]:
        raise EntryError(f"{names[0]} is a patch of a {families[0]} model and {names[1]} of a {families[1]}")
    if bases[0].get("sha256") != bases[1].get("sha256"):
        raise EntryError(
            f"{names[0]} and {names[1]} are patches of two bases: {_base(bases[0])} and {_base(bases[1])}. Only "
            "patches of one base go together"
        )
    other = [key for key in SAME_MAP if sidecars[0].get(key) != sidecars[1].get(key)]
    if other:
        found = ", ".join(f"sidecar.{key} = {sidecars[0].get(key)} and {sidecars[1].get(key)}" for key in other)
        raise EntryError(f"{names[0]} and {names[1]} are of two shapes: {found}")
    shapes = [{name: tuple(tensor.shape) for name, tensor in found.items()} for found in tensors]
    if shapes[0] != shapes[1]:
        key = sorted(shapes[0].items() ^ shapes[1].items())[0][0]
        raise EntryError(
            f"{names[0]} and {names[1]} are of two shapes: {key} is {shapes[0].get(key, 'missing')} and "
            f"{shapes[1].get(key, 'missing')}"
        )
    for name, ours in tensors[0].items():
        if name.endswith(".channels") and bool(((ours / tensors[1][name]).log().abs() > _SAME_CHANNELS).any()):
            raise EntryError(
                f"{names[0]} and {names[1]} measured the base's channels on different text: {name} differs by more "
                f"than {_SAME_CHANNELS:.0%}, so their weights mean different things and can't be added"
            )


def _base(base: dict[str, Any]) -> str:
    return f"{base.get('model')} (sha256 {str(base.get('sha256'))[:12]}…)"


def _by_layer(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".")
        if not layer.isdecimal() or not (rest == "channels" or rest.startswith(("coupling.", "gates."))):
            raise EntryError(
                f"tensor {name!r} is no sidecar's: expected names as 00.coupling..., 00.gates... and 00.channels"
            )
        found.setdefault(int(layer), {})[rest] = tensor.double()
    return found


def _weights(named: dict[str, Tensor]) -> Tensor:
    import torch

    return torch.cat(
        [named[name].flatten() for name in sorted(named) if name.startswith("coupling.") and "log_scale" not in name]
    )


def _facts(layer: int, named: dict[str, Tensor]) -> LayerFacts:
    biases = [float(tensor) for name, tensor in named.items() if name.startswith("gates.") and name.endswith(".bias")]
    squares = [
        float((tensor**2).sum())
        for name, tensor in named.items()
        if name.startswith("gates.") and name.endswith(".weight")
    ]
    return LayerFacts(
        layer,
        norm=float(_weights(named).norm()),
        gate=sum(_sigmoid(bias) for bias in biases) / max(len(biases), 1),
        gate_weight=math.sqrt(sum(squares)),
        scale=float(named["coupling.log_scale"].exp()),
    )


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
