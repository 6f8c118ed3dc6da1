"""A patch carried away: as one safetensors entry, or as a folder that transformers loads where there is no revpatch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from revpatch.durable import new_folder, sha256_of
from revpatch.ledger.entry import tensors_digest, write_entry
from revpatch.ledger.plain import canonical_json, to_plain
from revpatch.ledger.references import Located, locate
from revpatch.surgery.card import base_name, model_card
from revpatch.surgery.modeling import FILE_NAME, MODEL_TYPE, PREFIX, modeling_source
from revpatch.surgery.subject import Entry, Subject

FORMATS = ("safetensors", "hf")


def export(reference: str, to: str, out: Path, base: str | None = None) -> list[Path]:
    """Writes a patch into a new folder and returns its files.

    `safetensors` writes the entry, as `write_entry` packs it, without its base. `hf` writes config.json, the weights of
    base and patch, modeling_revpatch.py, the tokenizer and a model card, for
    `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)`.

    Args:
        reference: FILE, RUN or RUN@REF.
        to: one of `FORMATS`.
        out: a folder that is not there yet; it appears when it is whole.
        base: of `hf`, name or folder of the base; None is the one that the patch names.

    Raises:
        FileExistsError: `out` is there, or another process is writing it.
        ValueError, OSError: another format; no such patch or base, or a damaged one.
    """
    if to not in FORMATS:
        raise ValueError(f"--to {to}: expected one of {', '.join(FORMATS)}")
    located = locate(reference)
    entry = Entry.located(located, reference)
    if out.exists():
        raise FileExistsError(f"--out {out}: it exists. Nothing was overwritten: name a folder that is not there")
    with new_folder(out, f"--out {out}") as folder:
        if to == "safetensors":
            write_entry(folder / f"{located.path.stem}.safetensors", entry.tensors, entry.metadata)
        else:
            _write_hf(folder, entry, located, Subject.of(reference, base), out.name)
    return sorted(path for path in out.iterdir())


def _write_hf(folder: Path, entry: Entry, located: Located, subject: Subject, name: str) -> None:
    model: Any = subject.model
    weights = dict(model.state_dict())  # named as the blocks are wrapped, and so they are in the exported class
    weights |= {f"{PREFIX}{key}": tensor for key, tensor in entry.tensors.items()}
    if entry.sidecar.gate == "seq":  # its past changes with each token, so no cache can hold it
        model.generation_config.use_cache = model.config.use_cache = False
    type(model).save_pretrained(model, folder, state_dict=weights)  # the model's own is refused while it is patched
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
    (folder / "README.md").write_text(model_card(name, entry, located, model, sizes), encoding="utf-8")


def _public(thing: nn.Module | Any) -> str:
    """The class's name, if `from transformers import NAME` gives that class."""
    name = type(thing).__name__
    if getattr(transformers, name, None) is not type(thing):
        raise ValueError(f"{name} is no public class of transformers, so an exported model can't be built on it")
    return name
