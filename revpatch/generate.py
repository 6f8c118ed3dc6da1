"""Text from a base with a patch on it, off, or gated as learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from revpatch.config import SidecarConfig
from revpatch.ledger.entry import EntryError, read_entry
from revpatch.ledger.history import JOURNAL_NAME, Ledger
from revpatch.patch.patched_model import GateMode, attach, base_sha256, load_patch, set_gate, switchboard

DEFAULT_NEW_TOKENS = 80


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    greedy: bool = False
    max_new_tokens: int | None = None
    """Tokens to write; None is `DEFAULT_NEW_TOKENS`, or what the model's positions leave room for."""
    temperature: float = 0.8
    top_p: float = 0.9
    repetition_penalty: float = 1.15
    no_repeat_ngram: int = 4
    """No n-gram of this size twice; 0 allows it."""
    seed: int = 0


def load_patched(patch: Path, base: str | None = None) -> tuple[nn.Module, Any]:
    """The base with the patch of an entry attached, in eval mode, and the tokenizer.

    Args:
        patch: a ledger's entry (.pt or .safetensors). Where a journal lies beside it, the journal must vouch for it.
        base: name or folder of the base; None is the name that the entry gives.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no entry, is damaged, is not what the journal recorded, or belongs to another base.
    """
    if not patch.is_file():
        raise FileNotFoundError(
            f"patch {patch}: no such file; entries are in RUN/ledger/, see `revpatch ledger log RUN`"
        )
    in_ledger = (patch.parent / JOURNAL_NAME).is_file()
    tensors, metadata = Ledger(patch.parent, readonly=True).load(patch.name) if in_ledger else read_entry(patch)
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


def generate_text(patch: Path, prompt: str, gate: str, sampling: Sampling, base: str | None = None) -> str:
    """The prompt and what the model writes after it.

    Args:
        patch, base: as in `load_patched`.
        prompt: at least one token long.
        gate: "learned", "on" or "off".

    Raises:
        ValueError: as `load_patched`; an unknown gate mode; an empty prompt, or one that leaves no room to write.
    """
    if gate not in ("learned", "on", "off"):
        raise ValueError(f"--gate {gate!r}: choose learned, on or off")
    model, tokenizer = load_patched(patch, base)
    set_gate(model, cast(GateMode, gate))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    room = model.config.max_position_embeddings - ids.shape[1]  # type: ignore[union-attr, operator]
    if ids.shape[1] == 0:
        raise ValueError("--prompt is empty: give the model at least one token to go on from")
    wanted = sampling.max_new_tokens
    if room < (wanted or 1):
        raise ValueError(
            f"--prompt has {ids.shape[1]} tokens and the model reads at most {room + ids.shape[1]}, which leaves no "
            f"room for {wanted or 1} new ones: cut the prompt, or ask for at most {max(room, 0)} (--max-new-tokens)"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    switchboard(model).attached.to(device)
    torch.manual_seed(sampling.seed)
    drawn = {} if sampling.greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    out = model.generate(  # type: ignore[operator]
        ids.to(device),
        attention_mask=torch.ones_like(ids, device=device),
        do_sample=not sampling.greedy,
        max_new_tokens=wanted or min(DEFAULT_NEW_TOKENS, room),
        repetition_penalty=sampling.repetition_penalty,
        no_repeat_ngram_size=sampling.no_repeat_ngram,
        pad_token_id=tokenizer.eos_token_id,
        use_cache=switchboard(model).attached.config.gate != "seq",
        **drawn,
    )
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text
