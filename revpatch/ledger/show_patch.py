"""A patch, or two held against each other, printed for people: facts, held-out losses, and a table of the layers."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from revpatch.ledger.inspection import PatchDifference, PatchFacts
from revpatch.ledger.log import how_made
from revpatch.ledger.show import size


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
