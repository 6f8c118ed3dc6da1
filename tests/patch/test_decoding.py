"""Decoding: with the KV cache and without it a patched model is the same model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import left_padded
from patching import (
    TOLERANCE,
    Build,
    Config,
    Logits,
    Randomize,
    every_causal_gate,
    every_family,
    every_placement,
    in_chunks,
    largest,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache

from revpatch.config import SidecarConfig
from revpatch.patch.patched_model import attach, detach

DEMO_BASE = Path(__file__).resolve().parents[2] / "shards/demo_base"


@every_family
@every_causal_gate
@every_placement
@pytest.mark.parametrize(
    "cuts", [[12], [1] * 12, [5, 1, 3, 1, 2], [3, 9]], ids=["at once", "tokens", "mixed", "chunks"]
)
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("exactly", [False, True], ids=["float32", "float64"])
def test_cache_agrees(
    patched: Callable[..., Any],
    logits: Logits,
    family: str,
    gate: str,
    placement: str,
    cuts: list[int],
    padded: bool,
    exactly: bool,
) -> None:
    """To 1e-5 in float32, where rounding hides much; in float64, and with wilder sidecars, to a few thousand eps."""
    dtype = torch.float64 if exactly else torch.float32
    model = patched(family, dtype, 1.0 if exactly else 0.3, gate=gate, placement=placement)
    ids, mask = left_padded()
    given = mask if padded else None
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    error = largest(in_chunks(model, ids, given, cuts)[real], logits(model, ids, given)[real])
    assert error <= (1e-12 if exactly else TOLERANCE)


@every_causal_gate
@every_placement
@pytest.mark.parametrize("layers", [[0, 2], [1], [2]])
@pytest.mark.parametrize("bare", [False, True], ids=["with config", "bare"])
def test_cache_agrees_with_sidecars_on_some_blocks(
    patched: Callable[..., Any], logits: Logits, gate: str, placement: str, layers: list[int], bare: bool
) -> None:
    """A bare DynamicCache() has no layers at first and gets them one by one, in the middle of the first call."""
    for family in ("gpt2", "llama"):
        model = patched(family, gate=gate, placement=placement, layers=layers)
        ids, mask = left_padded()
        cache = DynamicCache() if bare else DynamicCache(config=model.config)
        found = in_chunks(model, ids, mask, [4, 1, 7], cache)
        assert largest(found[mask.bool()], logits(model, ids, mask)[mask.bool()]) <= TOLERANCE


@every_causal_gate
@every_placement
def test_padding_of_one_sequence_token_by_token(
    patched: Callable[..., Any], logits: Logits, gate: str, placement: str
) -> None:
    """A single sequence is stepped through, but not its padding, which no gate may count."""
    model = patched("llama", gate=gate, placement=placement)
    ids, mask = (tensor[:1] for tensor in left_padded())
    found = in_chunks(model, ids, mask, [1] * 12)[:, 4:]
    assert largest(found, logits(model, ids, mask)[:, 4:]) <= TOLERANCE
    assert largest(found, logits(model, ids[:, 4:])) <= TOLERANCE


def test_cache_agrees_in_bfloat16(build: Build, sidecar_config: Config, randomize: Randomize, logits: Logits) -> None:
    """Past scores stay in float32, so that a long prefix does not lose its last tokens."""
    model: Any = build("llama", dtype=torch.bfloat16)
    randomize(attach(model, sidecar_config()))
    ids, mask = left_padded()
    cache = DynamicCache(config=model.config)
    found = in_chunks(model, ids, mask, [1] * 12, cache)
    assert {layer.keys.dtype for layer in cache.layers[3:]} == {torch.float32}
    # Each of some dozen roundings of the stream to 8 bits, half an eps of 2⁻⁷, of logits of a few units.
    assert largest(found.float()[mask.bool()], logits(model, ids, mask).float()[mask.bool()]) <= 12 * 4 * 2**-8


@every_causal_gate
@pytest.mark.parametrize(("full", "placement"), [(1, "residual"), (0, "coupled")], ids=["some layers", "all layers"])
def test_sliding_windows(
    logits: Logits, sidecar_config: Config, randomize: Randomize, gate: str, full: int, placement: str
) -> None:
    """The cache forgets keys beyond the window; the gates' past goes back to the first token."""
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        pad_token_id=0,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=full,
        eos_token_id=2,
    )
    model: Any = Qwen2ForCausalLM(config).eval()
    assert config.layer_types == full * ["full_attention"] + (3 - full) * ["sliding_attention"]
    randomize(attach(model, sidecar_config(gate=gate, placement=placement)))
    ids, mask = left_padded()
    expected = logits(model, ids, mask)
    for cuts in ([1] * 12, [5, 3, 4]):
        found = in_chunks(model, ids, mask, cuts)
        assert largest(found[mask.bool()], expected[mask.bool()]) <= TOLERANCE
    knobs = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        runs = [
            model.generate(ids, attention_mask=mask, **knobs, num_beams=beams, **how)
            for how in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"})
        ]
        assert torch.equal(runs[1], runs[0]) and torch.equal(runs[2], runs[0])
    one = ids[1:2]
    expected = model.generate(one, **knobs, use_cache=False)
    assert torch.equal(model.generate(one, **knobs, prompt_lookup_num_tokens=3), expected)


@every_causal_gate
def test_cached_generation_on_real_weights(randomize: Randomize, logits: Logits, gate: str) -> None:
    """The demo's base, in float32, with a patch of the size that training gives it."""
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    ids = tokenizer("My fellow citizens, the state of the Union", return_tensors="pt").input_ids
    knobs = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    base = model.generate(ids, **knobs)
    randomize(attach(model, SidecarConfig(bottleneck=16, gate=gate)), 1, 0.5)
    text = model.generate(ids, **knobs)
    assert torch.equal(text, model.generate(ids, **knobs, use_cache=False))
    assert not torch.equal(text, base)
    found, expected = in_chunks(model, text, None, [5] + [1] * (text.shape[1] - 5)), logits(model, text)
    # Of logits of up to 16; the base's own, with a cache and without, differ by 1.2e-5.
    assert largest(found, expected) <= TOLERANCE * float(expected.abs().max())
    detach(model)
    assert torch.equal(model.generate(ids, **knobs), base)


@every_causal_gate
@every_placement
def test_cropped_copied_and_chosen_caches(
    patched: Callable[..., Any], logits: Logits, gate: str, placement: str
) -> None:
    model = patched("qwen2", gate=gate, placement=placement)
    ids, _ = left_padded()
    cache = DynamicCache(config=model.config)
    in_chunks(model, ids[:, :8], None, [6, 2], cache)
    shared = copy.deepcopy(cache)
    cache.crop(-3)
    other = torch.cat([ids[:, :5], ids[:, 5:].flip(1)], 1)
    found = in_chunks(model, other[:, 5:], None, [3, 4], cache)
    assert largest(found, logits(model, other)[:, 5:]) <= TOLERANCE

    again = in_chunks(model, ids[:, 8:], None, [4], copy.deepcopy(shared))
    assert largest(again, logits(model, ids)[:, 8:]) <= TOLERANCE
    filled, order = copy.deepcopy(shared), torch.tensor([2, 0, 0])
    shared.reorder_cache(order)
    assert largest(in_chunks(model, ids[order][:, 8:], None, [4], shared), logits(model, ids[order])[:, 8:]) <= 1e-5

    for choose, rows in (
        (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), torch.tensor([2, 0])),
    ):
        chosen = copy.deepcopy(filled)
        choose(chosen)
        found = in_chunks(model, ids[rows][:, 8:], None, [1, 3], chosen)
        assert largest(found, logits(model, ids[rows])[:, 8:]) <= TOLERANCE

    cache.reset()
    assert largest(in_chunks(model, ids, None, [7, 5], cache), logits(model, ids)) <= TOLERANCE


def test_deepcopy_of_a_patched_model_is_apart(patched: Callable[..., Any], logits: Logits) -> None:
    model = patched("llama")
    ids, mask = left_padded()
    expected = logits(model, ids, mask)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids, mask), expected)
    detach(twin)
    assert torch.equal(logits(model, ids, mask), expected)
    assert largest(logits(twin, ids, mask), expected) > 0.05
