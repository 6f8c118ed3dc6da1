"""A base model with a patch on it, from what a person writes to name the patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from revpatch.config import SidecarConfig
from revpatch.ledger.entry import EntryError
from revpatch.ledger.references import locate
from revpatch.patch.patched_model import attach, base_sha256, load_patch


def load_patched(patch: str | Path, base: str | None = None) -> tuple[nn.Module, Any]:
    """The base with the patch of an entry attached, in eval mode, and the tokenizer.

    Args:
        patch: a file, a run or `RUN@REF`, as in `ledger.references`.
        base: name or folder of the base; None is the name that the entry gives.

    Raises:
        FileNotFoundError: there is no such file or run.
        ValueError: it is no entry, is damaged, is not what the journal recorded, or belongs to another base.
    """
    tensors, metadata = locate(patch).load()
    try:
        of_base, sidecar = metadata["base"], SidecarConfig.model_validate(metadata["sidecar"])
        name, sha256, dtype = base or of_base["model"], of_base["sha256"], of_base["dtype"]
    except (KeyError, TypeError) as error:
        raise EntryError(
            f"{patch}: expected metadata of a base and a sidecar, found none ({error}): not a patch"
        ) from error
    try:
        revision = of_base.get("revision") if base is None else None
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except OSError as error:
        raise ValueError(f"base {name}: {str(error).splitlines()[0]}; name its folder with --base") from error
    found = base_sha256(model, rounded=True)
    if found != sha256:
        raise ValueError(
            f"{patch} is a patch of a base with sha256 {sha256[:16]}…, but {name} has {found[:16]}…: name the right "
            "base with --base"
        )
    model.eval()
    attach(model, sidecar)
    load_patch(model, tensors)
    return cast(nn.Module, model), tokenizer
