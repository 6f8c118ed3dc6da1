"""What an exported model says, in a process that has nothing of revpatch:  load_back.py FOLDER INPUTS OUT THREADS

`export` runs this file by itself, and calls `said` for the patched model that it holds; the two must agree to the bit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

MODES = ("learned", "on", "off")
SAMPLE = "The quick brown fox, 1234 of them; «größer» 日本\n\tand so on."
"""A text that both tokenizers encode."""


@torch.no_grad()
def said(
    model: Any, weights: Iterable[nn.Parameter], set_gate: Callable[[str], None], ids: Tensor, cached: bool
) -> dict[str, Tensor]:
    """Return the logits of ids (rows, time) in each mode of the gates, and a few tokens that are written after them.

    Args:
        model: on the CPU, in eval mode.
        weights: all of it. They are copied, as kernels add in an order that depends on where in memory a tensor begins.
        set_gate: switches the model's gates.
        ids: int64.
        cached: write with a cache.
    """
    for parameter in weights:
        parameter.data = parameter.data.clone()
    found = {}
    for mode in MODES:
        set_gate(mode)
        found[f"logits with the gates {mode}"] = model(input_ids=ids, use_cache=False).logits.contiguous()
    set_gate("learned")
    how = GenerationConfig(do_sample=False, max_new_tokens=4, min_new_tokens=4, use_cache=cached, pad_token_id=0)
    found["greedy text"] = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return found


def main(folder: str, inputs: str, out: str, threads: str) -> None:
    """Load the folder as a person on another machine does, and write what it says, and what transformers reports."""
    torch.set_num_threads(int(threads))
    given = load_file(inputs)
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    ids, cached = given["ids"], bool(given["cached"])
    found = said(model.eval(), list(model.parameters()), model.set_gate, ids, cached)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found["token ids"] = torch.tensor(tokenizer(SAMPLE)["input_ids"], dtype=torch.long)
    assert not [name for name in sys.modules if name.partition(".")[0] == "revpatch"], "revpatch was imported"
    reported = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys") if info.get(kind)}
    save_file(found, out, {"reported": json.dumps(reported)})


if __name__ == "__main__":
    main(*sys.argv[1:])
