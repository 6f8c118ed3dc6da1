"""Run by the interpreter of an environment without revpatch:  isolated.py IDS OUT FOLDER...

Loads every folder as a person on another machine would, and writes logits and greedy continuations, with and without
the patch.
"""

from __future__ import annotations

import importlib.util
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(ids_file: str, out: str, *folders: str) -> None:
    assert importlib.util.find_spec("revpatch") is None, "revpatch is here"
    ids = load_file(ids_file)["ids"]
    found = {}
    for number, folder in enumerate(folders):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        if number == 0:
            model.save_pretrained(f"{out} again")
            again, first = (load_file(f"{where}/model.safetensors") for where in (f"{out} again", folder))
            assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        found[f"{number}.text"] = torch.tensor(tokenizer("the patch learns")["input_ids"])
        for parameter in model.parameters():  # see test_export.py
            parameter.data = parameter.data.clone()
        with torch.no_grad():
            found[f"{number}.logits"] = model(ids).logits
            found[f"{number}.greedy"] = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=0
            )
            with model.patch_disabled():
                found[f"{number}.disabled"] = model(ids, use_cache=False).logits
            model.set_gate("off")
            found[f"{number}.off"] = model(ids, use_cache=False).logits
    assert "revpatch" not in sys.modules
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
