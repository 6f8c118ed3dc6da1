"""Packed blocks: the same states as with transformers' own masks, and models that need their masks keep them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from revpatch.patch.families import body_of
from revpatch.step.frozen_base import last_hidden_states

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64),
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "qwen2, sliding": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=0),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_states_are_those_of_the_model_called_as_ever(kind: str, attention: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]), attn_implementation=attention).eval()
    tokens = torch.randint(50, (3, 20))
    with torch.no_grad():
        expected = body_of(model)(tokens, use_cache=False).last_hidden_state
        found = last_hidden_states(model, tokens)
        changed = tokens.clone()
        changed[:, 12:] = (changed[:, 12:] + 1) % 50
        assert torch.equal(last_hidden_states(model, changed)[:, :12], found[:, :12]), "sees the future"
    assert torch.equal(found, expected)
    assert model.config._attn_implementation == attention


def test_the_attention_is_put_back_after_a_failure() -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["gpt2"])).eval()
    with pytest.raises(IndexError):
        last_hidden_states(model, torch.full((1, 4), 1000))
    assert model.config._attn_implementation == "sdpa"
