"""A patch carried away, as a file or as a folder that transformers loads without revpatch, and brought back.

The folder has a model card, filled in from the entry and its journal. Nothing of a folder's code is run on import.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from revpatch.durable import canonical_json, new_folder, sha256_of, to_plain
from revpatch.evaluation.losses import Subject, check_one_kind, of_base
from revpatch.ledger.events import EntryWritten, RolledBack
from revpatch.ledger.ledger import Ledger, PatchFile, read_patch
from revpatch.ledger.patch_file import (
    FOLDER_WEIGHTS,
    SUFFIX,
    EntryError,
    check_name,
    entry_name,
    tensors_digest,
    write_entry,
    write_torch,
)
from revpatch.patch.patched_model import GateMode, set_gate, switchboard
from revpatch.surgery import load_back
from revpatch.surgery.combine import DerivedCommit, check_finite, claimed, write
from revpatch.surgery.modeling import FILE_NAME, MODEL_TYPE, PREFIX, modeling_source

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
    """Return the card as Markdown.

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
    """Return a hub name as it is; of a folder the last part, as where it lay says nothing on another machine."""
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
    """Return the commits that led here, and their held-out losses; or what the entry alone says."""
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


FORMATS = ("safetensors", "hf", "pt")


def export(
    reference: str, to: str, out: Path, base: str | None = None, report: Callable[[str], object] = lambda words: None
) -> list[Path]:
    """Writes a patch into a new folder and returns its files.

    `safetensors` writes the entry as the ledger keeps it, without its base; `pt` the same as torch.save does, for other
    programs alone. `hf` writes config.json, the weights of
    base and patch, modeling_revpatch.py, the tokenizer and a model card, for
    `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)`. Before the folder gets its name it is loaded in
    a fresh process, and what it says is compared with the patched model, to the bit.

    Args:
        reference: FILE, RUN or RUN@REF.
        to: one of `FORMATS`.
        out: a folder that is not there yet; it appears when it is whole.
        base: of `hf`, name or folder of the base; None is the one that the patch names.
        report: is told in a line what is being done.

    Raises:
        FileExistsError: `out` is there, or another process is writing it.
        ValueError, OSError: another format; no such patch or base, or a damaged one; what was written is not the
            patched model. Nothing is left then.
    """
    if to not in FORMATS:
        raise ValueError(f"--to {to}: expected one of {', '.join(FORMATS)}")
    entry = of_base(read_patch(reference))
    if out.exists():
        raise FileExistsError(f"--out {out}: it exists. Nothing was overwritten: name a folder that is not there")
    with new_folder(out, f"--out {out}") as folder:
        if to == "safetensors":
            write_entry(folder / f"{entry.path.stem}.safetensors", entry.tensors, entry.metadata)
        elif to == "pt":
            write_torch(folder / f"{entry.path.stem}.pt", entry.tensors, entry.metadata)
        else:
            subject = Subject.of(reference, base)
            report("writing base and patch")
            _write_hf(folder, entry, subject, out.name)
            report("loading what was written in a fresh process, to compare it with the patched model")
            prove(folder, subject, entry)
            report("it is the patched model to the bit: logits, a greedy text and token ids")
    return sorted(path for path in out.iterdir())


def _write_hf(folder: Path, entry: PatchFile, subject: Subject, name: str) -> None:
    model: Any = subject.model
    weights = dict(model.state_dict())  # named as the blocks are wrapped, and so they are in the exported class
    weights |= {f"{PREFIX}{key}": tensor for key, tensor in entry.tensors.items()}
    if without_cache := entry.sidecar.gate == "seq":  # its past changes with each token, so no cache can hold it
        model.config.use_cache = False
    type(model).save_pretrained(model, folder, state_dict=weights)  # the model's own is refused while it is patched
    if without_cache:
        # Not through the model's own, which transformers refuses to write once it was changed if anything else in it is
        # not to its liking, as a temperature beside do_sample: false.
        how = {key: value for key, value in model.generation_config.to_diff_dict().items() if "cache" not in key}
        (folder / "generation_config.json").write_text(json.dumps({**how, "use_cache": False}, indent=2) + "\n")
    subject.tokenizer.save_pretrained(folder)
    kind = str(model.config.model_type)
    source = modeling_source(_public(model), _public(model.config), kind)
    (folder / FILE_NAME).write_text(source, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    module = FILE_NAME.removesuffix(".py")
    said = to_plain(
        {
            "sidecar": entry.sidecar.model_dump(mode="json"),
            "entry": {**entry.metadata, "base": {**entry.base, "model": base_name(entry)}},
            "sha256": entry.sha256,
            "tensors_sha256": tensors_digest(entry.tensors),
        }
    )
    config |= {
        "model_type": f"{MODEL_TYPE}{kind}",
        "architectures": ["RevpatchForCausalLM"],
        "auto_map": {"AutoConfig": f"{module}.RevpatchConfig", "AutoModelForCausalLM": f"{module}.RevpatchForCausalLM"},
        "revpatch": {**said, "content_sha256": sha256_of(canonical_json(said).encode())},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / "README.md").write_text(model_card(name, entry, model, sizes), encoding="utf-8")


def prove(folder: Path, subject: Subject, entry: PatchFile) -> None:
    """Hold what an exported folder says where there is no revpatch against what the patched model says here.

    Raises:
        ValueError: it can't be loaded there, or says anything else.
    """
    model: Any = subject.model.to("cpu")
    time = min(16, int(model.config.max_position_embeddings) - 4)
    ids = (torch.arange(2 * time).view(2, time) * 7919 + 11) % int(model.config.vocab_size)
    cached = entry.sidecar.gate != "seq"
    with tempfile.TemporaryDirectory() as place:
        inputs, out, code = (str(Path(place) / name) for name in ("inputs", "out", "code"))
        script = shutil.copy(load_back.__file__, place)  # not where it lies, as Python imports from beside a script
        save_file({"ids": ids, "cached": torch.tensor(cached)}, inputs)
        command = [sys.executable, script, str(folder.absolute()), inputs, out]
        # Packages may lie where only this process looks: a user's own, or those of PYTHONPATH.
        packages = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)
        env = {"HF_MODULES_CACHE": code, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            [*command, str(torch.get_num_threads())],
            env={**os.environ, **env, "PYTHONPATH": packages},
            cwd=place,  # not where something may be called transformers.py
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode != 0:
            last = (done.stderr.strip() or f"it ended with {done.returncode}").splitlines()[-1]
            raise ValueError(f"{_unproved(model)}: a fresh process can't load it ({last})")
        found = load_file(out)
        with safe_open(out, framework="pt") as file:
            reported = json.loads(file.metadata()["reported"])
    weights = [*model.parameters(), *switchboard(model).attached.parameters()]
    expected = load_back.said(model, weights, lambda mode: set_gate(model, cast(GateMode, mode)), ids, cached)
    expected["token ids"] = torch.tensor(subject.tokenizer(load_back.SAMPLE)["input_ids"], dtype=torch.long)
    wrong = []
    for name, tensor in expected.items():
        other = found[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape:
            wrong.append(f"{name}: {other.dtype} {tuple(other.shape)} instead of {tensor.dtype} {tuple(tensor.shape)}")
        elif not torch.equal(tensor, other):
            wrong.append(f"{name} differ by up to {float((tensor.double() - other.double()).abs().max()):.3g}")
    if wrong or reported:
        keys = [f"transformers reports {kind.replace('_', ' ')} {names[:3]}" for kind, names in reported.items()]
        raise ValueError(f"{_unproved(model)}: {'; '.join([*wrong, *keys])}")


def _unproved(model: Any) -> str:
    return (
        f"the export of this {model.config.model_type} is not the patched model when transformers "
        f"{transformers.__version__} loads it, so it was deleted; --to safetensors writes the patch alone"
    )


def _public(thing: nn.Module | Any) -> str:
    """Return the class's name, if `from transformers import NAME` gives that class."""
    name = type(thing).__name__
    if getattr(transformers, name, None) is not type(thing):
        raise ValueError(f"{name} is no public class of transformers, so an exported model can't be built on it")
    return name


_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def import_patch(source: Path, run: Path) -> DerivedCommit:
    """Records the patch as the newest commit of a run, under its phase's name.

    Args:
        source: a patch file, or a folder that `export` or `save_pretrained` wrote.
        run: a run, or a folder that is not there yet, which gets a ledger.

    Raises:
        ValueError, OSError: it is damaged, no patch, or not finite; or of another base or shape than the run's.
    """
    entry = _read_folder(source) if source.is_dir() else of_base(read_patch(str(source)))
    phase = str(entry.metadata.get("phase", "imported"))
    try:
        entry_name(0, phase, "commit")  # before a folder is made
    except EntryError as error:
        raise EntryError(f"{source}: {error}") from error
    made_by: dict[str, Any] = {
        "operation": "import",
        "sha256": entry.sha256,
        "parent": entry.metadata.get("parent"),
        "made_by": entry.metadata.get("made_by"),
    }
    check_finite(entry.tensors, str(source))
    with claimed(run, create=True) as ledger:
        if (newest := ledger.newest()) is not None:
            there = of_base(ledger.read(newest.name))
            check_one_kind(there, entry)
            # The same base, by the name under which this run finds it.
            said = {**entry.metadata, "base": there.base}
            entry = replace(entry, metadata=said, ledger=there.ledger, event=there.event)
        return write(ledger, phase, entry.tensors, entry, made_by, judgement=None)


def _read_folder(folder: Path) -> PatchFile:
    """Of the three kinds that there are: of save_pretrained, of `--to hf`, of `--to safetensors`."""
    if (folder / FOLDER_WEIGHTS).is_file():
        return of_base(read_patch(folder))
    if (folder / _CONFIG).is_file():
        return _read_hf(folder)
    files = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
    if len(files) != 1:
        raise FileNotFoundError(
            f"{folder}: expected a patch file, or a folder that `revpatch ledger export` or save_pretrained wrote, "
            f"found a folder without {_CONFIG} and {FOLDER_WEIGHTS}, and {len(files)} files ending in {SUFFIX}"
        )
    return of_base(read_patch(str(files[0])))


def _read_hf(folder: Path) -> PatchFile:
    config = folder / _CONFIG
    try:
        said = json.loads(config.read_text(encoding="utf-8"))["revpatch"]
        metadata, sha256, expected = dict(said["entry"]), str(said["sha256"]), str(said["tensors_sha256"])
        guarded = said.get("content_sha256")
        held = sha256_of(canonical_json({key: said[key] for key in said if key != "content_sha256"}).encode())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EntryError(
            f"{config}: expected a table `revpatch` that `revpatch ledger export` wrote, found none"
        ) from error
    if guarded != held:
        raise EntryError(
            f"{config}: its table `revpatch` should hash to {guarded}, found {held}: it was damaged or edited; take "
            "the folder from where it came again"
            if guarded
            else f"{config}: its table `revpatch` has no content_sha256, so nothing vouches for what it says of the "
            "patch: an older revpatch wrote it, or it was edited; export the patch again"
        )
    tensors = _sidecars(folder)
    if (found := tensors_digest(tensors)) != expected:
        raise EntryError(
            f"{folder}: its sidecars should hash to {expected}, found {found}: they were damaged or edited; take the "
            "folder from where it came again"
        )
    return of_base(PatchFile(folder, sha256, metadata, tensors, str(folder)))


def _sidecars(folder: Path) -> dict[str, Tensor]:
    files = [_WEIGHTS]
    if (folder / _INDEX).is_file():
        try:
            places = dict(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise EntryError(f"{folder / _INDEX}: expected a table `weight_map`, found none") from error
        names = {str(file) for name, file in places.items() if str(name).startswith(PREFIX)}
        files = sorted(check_name(name, f"{folder / _INDEX}: file") for name in names)
    tensors: dict[str, Tensor] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as file:
                ours = [key for key in file.keys() if key.startswith(PREFIX)]  # noqa: SIM118  (it is no dict)
                tensors |= {key.removeprefix(PREFIX): file.get_tensor(key) for key in ours}
        except (SafetensorError, OSError) as error:
            raise EntryError(
                f"{folder / name}: can't be read as safetensors ({error}): take it from where it came again"
            ) from error
    return tensors
