"""The model card of an exported patch, filled in from its entry and, where there is one, its journal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from revpatch.ledger.events import EntryWritten, RolledBack
from revpatch.ledger.history import Ledger, PatchFile
from revpatch.surgery.modeling import FILE_NAME

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- revpatch
# license: to be filled in by whoever publishes this; it depends on the base's licence and on the text learned
---

# {name}

The causal language model {base} with a removable patch on it: its weights are unchanged, and after {layers} of its
{blocks} blocks sits a gated sidecar (an additive coupling; gate: {gate}, placement: {placement}, bottleneck:
{bottleneck}). With the gate off the logits are those of the base, to the bit.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model.set_gate("off")  # or "learned", "on"
```

`trust_remote_code=True` runs `{code}`, which is in this folder and can be read first.{cache}

## What it has learned

{history}

## What it is

| | |
| --- | --- |
{facts}

## Licence

To be filled in: it depends on the licence of {base} and on the rights in the text that was learned.
"""


def model_card(name: str, entry: PatchFile, model: nn.Module, sizes: dict[str, int]) -> str:
    """The card as Markdown.

    Args:
        name: the exported folder's name.
        entry: what was exported.
        model: the base.
        sizes: bytes of the folder's files, by name.
    """
    layers = {key.partition(".")[0] for key in entry.tensors}
    seq = " Its gate sees the whole sequence, so it generates without a cache." if entry.sidecar.gate == "seq" else ""
    return _CARD.format(
        name=name,
        base=base_name(entry),
        layers=len(layers),
        blocks=int(model.config.num_hidden_layers),  # type: ignore[union-attr, arg-type]
        code=FILE_NAME,
        cache=seq,
        history=_history(entry),
        facts=_rows(_facts(entry, model, sizes)),
        **{key: getattr(entry.sidecar, key) for key in ("gate", "placement", "bottleneck")},
    )


def base_name(entry: PatchFile) -> str:
    """A hub name as it is; of a folder the last part, as where it lay says nothing on another machine."""
    model = str(entry.base["model"])
    return Path(model).name if Path(model).is_absolute() or model.startswith(".") else model


def _facts(entry: PatchFile, model: nn.Module, sizes: dict[str, int]) -> Iterable[tuple[str, str]]:
    patch = sum(tensor.numel() for tensor in entry.tensors.values())
    yield "parameters of the patch", f"{patch:,} in float32, {4 * patch:,} bytes"
    yield "parameters of the base", f"{sum(p.numel() for p in model.parameters()):,} in {entry.base['dtype']}"
    yield "written with, and needs as new", f"torch {torch.__version__}, transformers {transformers.__version__}"
    yield "sha256 of the patch's entry", f"`{entry.sha256}`"
    yield "sha256 of the base, rounded to bfloat16", f"`{entry.base['sha256']}`"
    if entry.base.get("revision") is not None:
        yield "revision of the base", str(entry.base["revision"])
    if "tokenizer" in entry.metadata:
        yield "fingerprint of the tokenizer", f"`{entry.metadata['tokenizer']}`"
    if "seed" in entry.metadata:
        yield "seed", str(entry.metadata["seed"])
    for file, size in sizes.items():
        yield f"`{file}`", f"{size:,} bytes"


def _history(entry: PatchFile) -> str:
    """The commits that led here, and their held-out losses; or what the entry alone says."""
    ledger, recorded = entry.ledger, entry.event
    if ledger is None or recorded is None:
        phase, losses = str(entry.metadata.get("phase", "")), dict(entry.metadata.get("probes", {}))
        rows = [f"| {name} |  | {_number(loss)} |  |" for name, loss in losses.items()]
        return _losses(phase, rows) or "No journal came with this patch."
    commits = [of for of in ledger.entries() if of.kind == "commit" and of.seq < recorded.seq]
    parts = [_phase(ledger, of) for of in (*commits, recorded)]
    return "\n\n".join([*parts[:-1], f"{parts[-1]}\n\nThis folder holds `{recorded.name}`."])


def _phase(ledger: Ledger, entry: EntryWritten) -> str:
    back = sum(event.phase == entry.phase for event in ledger.journal.events(RolledBack))
    rollbacks = f", {back} rollback{'s' if back != 1 else ''}" if back else ""
    how = f", made by {entry.made_by['operation']}" if entry.made_by and "operation" in entry.made_by else ""
    rows = [
        f"| {name} | {_number(reading.reference)} | {_number(reading.loss)} | "
        f"{_number(reading.tolerance) if reading.guarded else 'not guarded'} |"
        for name, reading in (entry.sets or {}).items()
    ]
    table = _losses(entry.phase, rows)
    head = f"**{entry.phase}** (`{entry.name}`, sha256 `{entry.sha256[:16]}…`{rollbacks}{how})"
    return f"{head}\n\n{table}" if table else head


def _losses(phase: str, rows: list[str]) -> str:
    if not rows:
        return ""
    head = f"| held-out set | before {phase} | after | tolerance |"
    return "\n".join([head, "| --- | --- | --- | --- |", *rows, "", "Losses in nats per token."])


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


def _rows(facts: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in facts)
