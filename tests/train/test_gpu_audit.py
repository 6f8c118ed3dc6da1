"""What can be known of the GPU path without a GPU: a whole step on tensors of another device than the CPU.

A meta tensor has a shape, a dtype and a device, and no values: an operation that mixes it with a CPU tensor raises, and
so does one that needs a value on the host, which is where a real step would wait for the GPU. (torch's fake tensors of
a CUDA device can't be differentiated by a torch that was built without CUDA, and torch's fused AdamW takes no meta
tensors: `test_engine.py` counts the reads of a whole engine's step.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from revpatch.config import ObjectiveConfig, SidecarConfig
from revpatch.monitoring.record import RunningMean
from revpatch.patch.families import body_of
from revpatch.patch.patched_model import switchboard, wrap
from revpatch.step.frozen_base import _no_mask, make_lean
from revpatch.step.objective import PatchObjective
from revpatch.step.teacher import Teacher

SMALL: dict[str, Any] = {"vocab_size": 50, "max_position_embeddings": 16, "attn_implementation": "sdpa"}


@pytest.fixture
def elsewhere() -> Iterator[None]:
    with torch.device("meta"):
        yield


def make(kind: str) -> nn.Module:
    """A bfloat16 base; what is made after it is float32."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        if kind == "gpt2":
            return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, **SMALL)).eval()
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                **SMALL,
            )
        ).eval()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("placement", ["residual", "coupled"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_step_stays_on_the_gpu_and_asks_it_for_no_value(elsewhere: None, kind: str, placement: str) -> None:
    base = make(kind)
    patch = wrap(base, SidecarConfig(bottleneck=4, placement=placement))  # type: ignore[arg-type]
    make_lean(base)
    switchboard(base).checkpointing = True
    teacher = Teacher(base)
    teacher.follow(patch)
    weights = ObjectiveConfig(gate_l1_weight=0.1, patch_l2_weight=0.1, stats_drift_weight=0.1, distill_temperature=2.0)
    objective = PatchObjective(base, patch, teacher, weights)
    meter = RunningMean()
    new, replay = (torch.randint(50, (2, 16)) for _ in range(2))
    for _ in range(2):
        output = objective(new, replay)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(patch.parameters(), 1.0)
        patch.zero_grad()
        meter.add(output.terms, output.layers)
    mean = meter.take()
    assert mean is not None and mean.device.type == "meta"
    assert all(p.device.type == "meta" and p.dtype == torch.float32 for p in patch.parameters())


@pytest.mark.parametrize("gate", ["prefix", "token"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_token_of_text_asks_the_gpu_for_no_more_than_without_a_patch(elsewhere: None, kind: str, gate: str) -> None:
    """The patch's own part of a call with a cache: its history grows and nothing of it is read on the host. (Mask and
    positions of a prompt are looked at once, as a row of several texts must be refused.)"""
    base = make(kind)
    wrap(base, SidecarConfig(bottleneck=4, gate=gate))  # type: ignore[arg-type]
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        for last in range(1, 7):  # the positions are given, or transformers looks for packed texts in them
            here, mask = torch.arange(last - 1, last)[None], torch.ones(1, last, dtype=torch.int64)
            with _no_mask(base):
                out = base(here, position_ids=here, attention_mask=mask, past_key_values=cache, use_cache=True)
    assert out.logits.device.type == "meta"
    assert cache.layers[cache.revpatch_layer].get_seq_length() == 6  # type: ignore[attr-defined]


def test_the_audit_sees_a_wait(elsewhere: None) -> None:
    """The same model called without what training does about it: transformers looks at the positions of each batch."""
    base = make("gpt2")
    with pytest.raises(RuntimeError, match="meta"):
        body_of(base)(torch.randint(50, (2, 16)), use_cache=False)
