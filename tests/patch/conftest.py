"""Tiny random models of every family, built from configs, and sidecars that look trained. Nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gated_families import GATED
from torch import Tensor, nn
from toy import make_it_look_trained
from transformers import GPT2Config, GPT2LMHeadModel

from revpatch.config import SidecarConfig
from revpatch.patch.patched_model import attach

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB, WIDTH, BLOCKS, POSITIONS = 61, 16, 3, 64

Build = Callable[..., nn.Module]
Randomize = Callable[..., nn.Module]
Logits = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Small kernels run fastest on one thread, and every test starts from the same seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def build() -> Build:
    """build(family, tied=True, dtype=float32, width=16, blocks=3): a tiny random model in eval mode."""
    return _build


@pytest.fixture
def randomize() -> Randomize:
    """randomize(patch_or_sidecar, seed=1, strength=1.0): fills in place what is zero at the start, and returns it."""
    return make_it_look_trained


@pytest.fixture
def logits() -> Logits:
    """logits(model, ids, mask=None, **kwargs): without a cache, positions counted over real tokens only."""
    return _logits


@pytest.fixture
def sidecar_config() -> Callable[..., SidecarConfig]:
    """A SidecarConfig with a small bottleneck."""
    return lambda **knobs: SidecarConfig(**{"bottleneck": 4, **knobs})


@pytest.fixture
def patched(sidecar_config: Callable[..., SidecarConfig]) -> Callable[..., Any]:
    """patched(family, dtype=float32, strength=1.0, **knobs): a model with a patch that looks trained."""

    def _patched(family: str = "gpt2", dtype: torch.dtype = torch.float32, strength: float = 1.0, **knobs: Any) -> Any:
        model = _build(family, dtype=dtype)
        make_it_look_trained(attach(model, sidecar_config(**knobs)), 1, strength).to(dtype)
        return model

    return _patched


def _build(
    family: str = "gpt2",
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    width: int = WIDTH,
    blocks: int = BLOCKS,
    seed: int = 0,
) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module
    if family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_positions=POSITIONS,
                n_embd=width,
                n_layer=blocks,
                n_head=1 if width % 2 else 2,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                tie_word_embeddings=tied,
                initializer_range=0.2,
            )
        )
    else:
        config, kind = GATED[family]
        model = kind(
            config(
                vocab_size=VOCAB,
                max_position_embeddings=POSITIONS,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=blocks,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=width // 2,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                tie_word_embeddings=tied,
                initializer_range=0.2,
            )
        )
    return model.to(dtype).eval()


def _logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **kwargs: object) -> Tensor:
    if mask is not None:
        kwargs.setdefault("position_ids", (mask.long().cumsum(1) - 1).clamp(min=0))
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs).logits
    return out
