"""A patch carried away: as one safetensors entry, or as a folder that transformers loads where there is no revpatch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from revpatch.durable import new_folder, sha256_of
from revpatch.ledger.history import PatchFile
from revpatch.ledger.patch_file import tensors_digest, write_entry, write_torch
from revpatch.ledger.plain import canonical_json, to_plain
from revpatch.ledger.references import read_patch
from revpatch.patch.patched_model import GateMode, set_gate, switchboard
from revpatch.surgery import load_back
from revpatch.surgery.card import base_name, model_card
from revpatch.surgery.modeling import FILE_NAME, MODEL_TYPE, PREFIX, modeling_source
from revpatch.surgery.subject import Subject, of_base

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
    """The class's name, if `from transformers import NAME` gives that class."""
    name = type(thing).__name__
    if getattr(transformers, name, None) is not type(thing):
        raise ValueError(f"{name} is no public class of transformers, so an exported model can't be built on it")
    return name
