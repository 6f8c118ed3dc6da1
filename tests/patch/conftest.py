"""Tiny random models of every family, built from configs. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gated_families import GATED
from patching import knobs
from toy import make_it_look_trained
from transformers import GPT2Config, GPT2LMHeadModel

from revpatch.patch.patched_model import attach


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Small kernels run fastest on one thread, and every test starts from the same seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def build() -> Callable[..., Any]:
    """build(family, tied=True, dtype=float32, width=16, blocks=3, seed=0): a tiny random model in eval mode."""
    return _build


@pytest.fixture
def patched() -> Callable[..., Any]:
    """patched(family, dtype=float32, strength=1.0, **sidecar): a model whose patch looks trained."""

    def _patched(
        family: str = "gpt2", dtype: torch.dtype = torch.float32, strength: float = 1.0, **sidecar: Any
    ) -> Any:
        model = _build(family, dtype=dtype)
        make_it_look_trained(attach(model, knobs(**sidecar)), 1, strength).to(dtype)
        return model

    return _patched


def _build(
    family: str = "gpt2",
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    width: int = 16,
    blocks: int = 3,
    seed: int = 0,
) -> Any:
    torch.manual_seed(seed)
    shared: dict[str, Any] = {
        "vocab_size": 61,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    if family == "gpt2":
        sizes = {"n_positions": 64, "n_embd": width, "n_layer": blocks, "n_head": 1 if width % 2 else 2}
        return GPT2LMHeadModel(GPT2Config(**shared, **sizes)).to(dtype).eval()
    config, kind = GATED[family]
    sizes = {
        "max_position_embeddings": 64,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": blocks,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
    }
    return kind(config(**shared, **sizes)).to(dtype).eval()
