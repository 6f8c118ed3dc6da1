"""Kinds of cache and of calls: which a gate takes, and which it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import left_padded
from patching import (
    TOLERANCE,
    Logits,
    every_causal_gate,
    every_placement,
    in_chunks,
    largest,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from revpatch.patch.patched_model import attach, detach, patch_disabled


@every_placement
def test_sequence_gate_refuses_a_cache(patched: Callable[..., Any], placement: str) -> None:
    model = patched("gpt2", gate="seq", placement=placement)
    ids, mask = left_padded(6)
    with pytest.raises(ValueError, match=r"SeqGate depends on the whole sequence.*use_cache=False"):
        model(ids, attention_mask=mask, use_cache=True)
    with pytest.raises(ValueError, match=r"SeqGate depends on the whole sequence.*use_cache=False"):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=3, use_cache=False, pad_token_id=0, eos_token_id=None)
    assert out.shape == (3, 9)


class _OtherCache(Cache):
    """A kind that nobody has heard of."""


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@every_causal_gate
def test_a_static_cache(patched: Callable[..., Any], logits: Logits, family: str, gate: str) -> None:
    """Used again after reset."""
    model = patched(family, gate=gate)
    ids, mask = left_padded()
    expected = logits(model, ids, mask)
    cache = StaticCache(config=model.config, max_cache_len=20)
    for _ in range(2):
        found = in_chunks(model, ids, mask, [5, 1, 6], cache)
        assert largest(found[mask.bool()], expected[mask.bool()]) <= TOLERANCE
        cache.reset()


@every_causal_gate
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_static_cache_token_by_token(
    patched: Callable[..., Any], logits: Logits, gate: str, padded: bool, rows: int
) -> None:
    """The places of a static cache that are still empty are not attended to, mask or none."""
    model = patched("llama", gate=gate)
    ids, mask = (tensor[-rows:] for tensor in left_padded())
    given = mask if padded else None
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    found = in_chunks(model, ids, given, [5, *[1] * 7], StaticCache(model.config, max_cache_len=20))
    assert largest(found[real], logits(model, ids, given)[real]) <= TOLERANCE


@every_causal_gate
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_mask_longer_than_the_tokens_so_far(
    patched: Callable[..., Any], logits: Logits, gate: str, kind: str, rows: int
) -> None:
    """Ones for the tokens, then zeros for the places to come: those are not this call's padding."""
    model = patched("llama", gate=gate)
    ids, mask = (tensor[:rows] for tensor in left_padded())
    expected, real = logits(model, ids, mask), mask.bool()
    long = torch.cat([mask, torch.zeros(rows, 8, dtype=mask.dtype)], 1)
    cache = StaticCache(model.config, max_cache_len=20) if kind == "static" else DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    parts = []
    for here in (slice(0, 7), slice(7, 8), slice(8, 12)):
        so_far = long.clone()
        so_far[:, here.stop :] = 0
        with torch.no_grad():
            out = model(ids[:, here], attention_mask=so_far, position_ids=positions[:, here], past_key_values=cache)
        parts.append(out.logits)
    assert largest(torch.cat(parts, 1)[real], expected[real]) <= TOLERANCE


def test_a_mask_of_pairs_that_is_not_only_padding_is_refused(patched: Callable[..., Any]) -> None:
    model, ids = patched("llama"), left_padded()[0]
    mask = torch.zeros(3, 1, 12, 20, dtype=torch.bool)
    mask[..., :12] = True  # every token sees every other
    with pytest.raises(ValueError, match=r"\(batch, time\).*two-dimensional"):
        in_chunks(model, ids, mask, [12], StaticCache(config=model.config, max_cache_len=20))


class _Offloaded(DynamicCache):
    """As one that is offloaded, without the streams that only a GPU has."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.offloading = False
        states = super().update(*args, **kwargs)
        self.offloading = True
        return states


@every_causal_gate
def test_an_offloaded_cache_is_refused(patched: Callable[..., Any], gate: str) -> None:
    """After its last layer transformers fetches the next, which would be the patch's and not the first block's."""
    model, ids = patched("llama", gate=gate), left_padded()[0]
    with pytest.raises(ValueError, match=r"_Offloaded, is offloaded .* layer by layer.* cache_implementation"):
        in_chunks(model, ids, None, [12], _Offloaded(config=model.config))
    with patch_disabled(model):
        in_chunks(model, ids, None, [5, 7], _Offloaded(config=model.config))


@every_causal_gate
def test_rows_of_several_sequences(patched: Callable[..., Any], logits: Logits, gate: str) -> None:
    """As `generate_batch` packs them: a gate that averages would do so over strangers."""
    model, ids = patched("llama", gate=gate), left_padded()[0]
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    if gate == "token":
        assert torch.equal(logits(model, ids, cu_seq_lens_q=ends), logits(model, ids))
        return
    with pytest.raises(ValueError, match=r"cu_seq_lens_q says.*several sequences.*generate_batch.*gate: token"):
        logits(model, ids, cu_seq_lens_q=ends)
    with patch_disabled(model):
        logits(model, ids, cu_seq_lens_q=ends)


def test_other_kinds_of_cache_are_refused_for_a_prefix_gate_only(patched: Callable[..., Any], logits: Logits) -> None:
    ids, _ = left_padded()
    model = patched("llama")
    with pytest.raises(ValueError, match="prefix gate keeps its past in a DynamicCache or a StaticCache, found _Other"):
        in_chunks(model, ids, None, [12], _OtherCache(layer_class_to_replicate=DynamicLayer))
    model = patched("llama", gate="token")
    cache = _OtherCache(layer_class_to_replicate=DynamicLayer)
    for _ in range(2):
        assert largest(in_chunks(model, ids, None, [5, 7], cache), logits(model, ids)) <= TOLERANCE
        cache.reset()


@pytest.mark.parametrize("change", ["crop", "detach", "disable"])
def test_other_kinds_of_cache_are_refused_once_they_hold_what_a_token_gate_cannot_know_of(
    patched: Callable[..., Any], change: str
) -> None:
    model, ids = patched("llama", gate="token"), left_padded()[0]
    cache = _OtherCache(layer_class_to_replicate=DynamicLayer)
    in_chunks(model, ids[:, :5], None, [5], cache)
    if change == "crop":
        cache.crop(-2)
    elif change == "detach":
        patch = detach(model)
        in_chunks(model, ids[:, 5:6], None, [1], cache)
        attach(model, patch)
    else:
        with patch_disabled(model):
            in_chunks(model, ids[:, 5:6], None, [1], cache)
    words = "without this patch" if change == "disable" else "last call there were 5: .* _OtherCache can't say which"
    with pytest.raises(ValueError, match=words):
        in_chunks(model, ids[:, 6:], None, [6], cache)
