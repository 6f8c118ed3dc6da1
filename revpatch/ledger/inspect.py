"""One patch by layers, and two compared, without the base: what `ledger show` and `ledger diff` print.

Names are those of an entry: `03.coupling...` belongs to the sidecar after block 3, `03.gates...` to its gates, and
`03.channels` holds the sizes of the block's channels in the base.

    norm      L2 norm of all weights of F and G
    cosine    between the weights of two patches; 1 is the same direction
    gate      what a gate is for a hidden state without any direction, σ(b); the mean of both when coupled
    scale     s = exp(log s)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from revpatch.durable import size, to_plain
from revpatch.ledger.events import EntryWritten
from revpatch.ledger.ledger import PatchFile, read_patch
from revpatch.ledger.log import how_made
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


def layer_facts(tensors: dict[str, Tensor]) -> list[LayerFacts]:
    """Return the facts of each layer, in order; tensors as an entry holds them. Raises EntryError for other tensors."""
    return [_facts(layer, named) for layer, named in sorted(_by_layer(tensors).items())]


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[LayerDifference]:
    """Return the layers of two patches that `check_comparable` has let pass."""
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


@dataclass(frozen=True)
class PatchFacts:
    """A patch file: where it is, what it and the journal say of it, and its layers.

    `recorded` is None for a file that no journal lies beside.
    `parent` is the name of the entry it descends from, or the sha256 of one that is not kept.
    """

    name: str
    path: str
    metadata: dict[str, Any]
    recorded: EntryWritten | None
    parent: str | None
    layers: list[LayerFacts]

    def as_fields(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        plain: dict[str, Any] = to_plain(asdict(self))
        return plain


@dataclass(frozen=True)
class PatchDifference:
    """Two patches of one base. `probes` has, by set, the losses and gates that the journal recorded with each, where
    it recorded them: [of the first, of the second]."""

    names: tuple[str, str]
    layers: list[LayerDifference]
    probes: dict[str, dict[str, list[float | None]]]

    def as_fields(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        plain: dict[str, Any] = to_plain(asdict(self))
        return plain


def inspect(reference: str) -> PatchFacts:
    """Return what a patch is, its file checked against the journal first.

    Raises:
        FileNotFoundError, EntryError, JournalError: as `read_patch` does; or it is no patch.
    """
    patch = read_patch(reference)
    check_patch(patch.path.name, patch.metadata)
    return PatchFacts(
        patch.path.name,
        str(patch.path),
        patch.metadata,
        patch.event,
        _parent(patch),
        layer_facts(patch.tensors),
    )


def compare_patches(first: str, second: str) -> PatchDifference:
    """Return how two patches differ, layer by layer.

    Raises:
        FileNotFoundError, EntryError, JournalError: as `inspect`; or they are of two bases or shapes.
    """
    a, b = read_patch(first), read_patch(second)
    check_comparable((first, second), (a.metadata, b.metadata), (a.tensors, b.tensors))
    return PatchDifference((first, second), differences(a.tensors, b.tensors), _probes(a, b))


def _parent(patch: PatchFile) -> str | None:
    sha256 = patch.metadata.get("parent")
    if sha256 is None or patch.ledger is None:
        return sha256
    # Entries with the same content have the same sha256: the latest before this one is the parent.
    before = patch.event.seq if patch.event is not None else 0
    named = [entry.name for entry in patch.ledger.entries() if entry.sha256 == sha256 and entry.seq < before]
    return named[-1] if named else str(sha256)


def _probes(*patches: PatchFile) -> dict[str, dict[str, list[float | None]]]:
    sets = [(None if each.event is None else each.event.sets) or {} for each in patches]
    return {
        name: {
            "loss": [found[name].loss if name in found else None for found in sets],
            "gate": [found[name].gate if name in found else None for found in sets],
        }
        for name in {**sets[0], **sets[1]}
    }


def print_patch(facts: PatchFacts, console: Console) -> None:
    """Prints what a patch is."""
    recorded, metadata = facts.recorded, facts.metadata
    base, sidecar = metadata["base"], metadata["sidecar"]
    lines = {
        "kind": f"{metadata.get('kind')} of phase {metadata.get('phase')}, step {metadata.get('step')}",
        "recorded": f"{recorded.time[:19].replace('T', ' ')}, line {recorded.seq + 1}" if recorded else None,
        "sha256": recorded.sha256 if recorded else None,
        "size": size(recorded.bytes) if recorded else None,
        "descends from": facts.parent,
        "restored from": _restored(recorded.restored if recorded else None),
        "made by": how_made(metadata.get("made_by")) or None,
        "base": f"{base.get('model')} ({base.get('dtype')}, sha256 {base.get('sha256')})",
        "tokenizer": metadata.get("tokenizer"),
        "sidecar": ", ".join(f"{key} {value}" for key, value in sidecar.items()),
        "seed": metadata.get("seed"),
    }
    _line(console, f"{facts.name} in {facts.path.removesuffix(facts.name)}", "bold")
    for name, value in lines.items():
        if value is not None:
            _line(console, f"  {name:14} {value}")
    for name, reading in ((recorded.sets if recorded else None) or {}).items():
        _line(console, f"  {'held-out loss':14} {name} {reading.loss} ({reading.rise:+.4f})")
    table = _table("layer", "norm", "gate at rest", "gate weight", "scale")
    for layer in facts.layers:
        table.add_row(str(layer.layer), *map(_figure, (layer.norm, layer.gate, layer.gate_weight, layer.scale)))
    console.print(table)


def print_difference(difference: PatchDifference, console: Console) -> None:
    """Prints how two patches differ; of each pair the first patch's value comes first."""
    _line(console, f"A {difference.names[0]}\nB {difference.names[1]}")
    table = _table("layer", "norm A", "norm B", "|A - B|", "cosine", "gate at rest A", "B", "scale A", "B")
    for row in difference.layers:
        ours, theirs = row.first, row.second
        norms, scales = (ours.norm, theirs.norm), (ours.scale, theirs.scale)
        values = (*norms, row.distance, row.cosine, ours.gate, theirs.gate, *scales)
        table.add_row(str(row.layer), *map(_figure, values))
    console.print(table)
    if not difference.probes:
        _line(console, "no held-out losses were recorded with either")
        return
    table = _table("held-out set", "loss A", "loss B", "change", "mean gate A", "B")
    for name, found in difference.probes.items():
        (a, b), change = found["loss"], ""
        if a is not None and b is not None:
            change = f"{b - a:+.4f}"
        table.add_row(Text(name), _figure(a), _figure(b), change, *map(_figure, found["gate"]))
    console.print(table)


def _restored(source: dict[str, Any] | None) -> str | None:
    if source is None:
        return None
    return f"{source.get('from')} ({source.get('file')}, sha256 {source.get('sha256')})"


def _table(*columns: str) -> Table:
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)
