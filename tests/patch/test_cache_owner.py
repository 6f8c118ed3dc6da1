"""A cache belongs to the patch that has read all of it, whichever the gate; others refuse it until it is emptied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from batches import left_padded
from patching import (
    TOLERANCE,
    Config,
    Logits,
    Randomize,
    every_causal_gate,
    every_placement,
    in_chunks,
    largest,
)
from transformers.cache_utils import DynamicCache, StaticCache

from revpatch.patch.patched_model import Patch, active_patch, attach, detach, patch_disabled, set_gate


@every_causal_gate
@every_placement
def test_a_cache_filled_without_the_patch_is_refused(
    patched: Callable[..., Any], sidecar_config: Config, randomize: Randomize, gate: str, placement: str
) -> None:
    """By the base, by gates held open, or by another patch: its keys and values are of another model."""
    model = patched("gpt2", gate=gate, placement=placement)
    ids, _ = left_padded()
    other = randomize(Patch(16, 3, sidecar_config(gate=gate, placement=placement)), seed=2)

    def base(cache: DynamicCache) -> None:
        with patch_disabled(model):
            in_chunks(model, ids[:, :5], None, [5], cache)

    def held_open(cache: DynamicCache) -> None:
        set_gate(model, "on")
        in_chunks(model, ids[:, :5], None, [5], cache)
        set_gate(model, "learned")

    def another(cache: DynamicCache) -> None:
        with active_patch(model, other):
            in_chunks(model, ids[:, :5], None, [5], cache)

    for fill in (base, held_open, another):
        cache = DynamicCache(config=model.config)
        fill(cache)
        with pytest.raises(ValueError, match=r"holds 5 past tokens.*without this patch.*empty cache"):
            in_chunks(model, ids[:, 5:], None, [7], cache)


@every_causal_gate
@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_cache_that_went_on_without_the_patch_is_refused(
    patched: Callable[..., Any], logits: Logits, gate: str, mode: str
) -> None:
    """Tokens that the base, or gates held open, read in between are not what the patch would have made of them."""
    model = patched("gpt2", gate=gate, layers=[1, 2])
    ids, _ = left_padded()
    cache = DynamicCache(config=model.config)
    in_chunks(model, ids[:, :3], None, [3], cache)
    set_gate(model, mode)
    in_chunks(model, ids[:, 3:5], None, [2], cache)
    set_gate(model, "learned")
    with pytest.raises(ValueError, match=r"holds 5 past tokens.*without this patch.*empty cache"):
        in_chunks(model, ids[:, 5:], None, [7], cache)
    cache.reset()
    assert largest(in_chunks(model, ids, None, [5, 7], cache), logits(model, ids)) <= TOLERANCE


@every_causal_gate
@pytest.mark.parametrize(("static", "taken_back"), [(False, 0), (False, 2), (True, 0)])
def test_tokens_that_were_read_while_the_patch_was_detached_are_noticed(
    patched: Callable[..., Any], logits: Logits, gate: str, static: bool, taken_back: int
) -> None:
    """Even if the cache holds no more of them than the patch had read: their keys and values are the base's."""
    model, ids = patched("gpt2", gate=gate), left_padded()[0]
    cache: Any = StaticCache(model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
    in_chunks(model, ids[:, :5], None, [5], cache)
    attach(model, detach(model))  # no token is read meanwhile, so nothing is lost
    found = in_chunks(model, ids[:, 5:7], None, [1, 1], copy.deepcopy(cache))
    assert largest(found, logits(model, ids[:, :7])[:, 5:]) <= TOLERANCE
    patch = detach(model)
    if taken_back:
        cache.crop(-taken_back)
    in_chunks(model, ids[:, 3:5], None, [2], cache)
    attach(model, patch)
    with pytest.raises(ValueError, match=rf"holds {cache.get_seq_length()} past tokens.*without this patch.*empty"):
        in_chunks(model, ids[:, 5:], None, [7], cache)
    cache.reset()
    assert largest(in_chunks(model, ids, None, [5, 7], cache), logits(model, ids)) <= TOLERANCE


@every_causal_gate
def test_an_emptied_cache_serves_another_patch(
    patched: Callable[..., Any], sidecar_config: Config, randomize: Randomize, logits: Logits, gate: str
) -> None:
    model = patched("llama", gate=gate)
    ids, mask = left_padded()
    cache = DynamicCache(config=model.config)
    in_chunks(model, ids, mask, [12], cache)
    cache.reset()
    other = randomize(Patch(16, 3, sidecar_config(placement="coupled", layers=[1, 2])), seed=2)
    with active_patch(model, other):
        found = in_chunks(model, ids, mask, [6, 6], cache)
        assert largest(found[mask.bool()], logits(model, ids, mask)[mask.bool()]) <= TOLERANCE


@pytest.mark.parametrize(("attached", "active"), [([0], [0, 1, 2]), ([0, 1, 2], [1])])
def test_the_active_patch_decides_what_the_cache_keeps(
    patched: Callable[..., Any],
    sidecar_config: Config,
    randomize: Randomize,
    logits: Logits,
    attached: list[int],
    active: list[int],
) -> None:
    model = patched("gpt2", layers=attached)
    other = randomize(Patch(16, 3, sidecar_config(layers=active)), seed=2)
    ids, mask = left_padded()
    with active_patch(model, other):
        found = in_chunks(model, ids, mask, [6, 6])
        assert largest(found[mask.bool()], logits(model, ids, mask)[mask.bool()]) <= TOLERANCE
