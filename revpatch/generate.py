"""Text from a base with a patch on it, off, or gated as learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from revpatch.loading import load_patched
from revpatch.patch.patched_model import GateMode, set_gate, switchboard

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
