"""A patch on a whole model: what it must never change, how the model may be called, and another patch on it."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from patching import (
    ROUNDING,
    Build,
    Config,
    Logits,
    Randomize,
    every_dtype,
    every_family,
    every_gate,
    every_placement,
    largest,
    some_ids,
)
from torch import nn

from revpatch.patch.families import blocks_of, body_of, head_of
from revpatch.patch.patched_model import (
    Patch,
    PatchedBlock,
    active_patch,
    attach,
    base_parameters,
    base_sha256,
    detach,
    patch_disabled,
    patch_state,
    set_gate,
)


@every_family
@every_gate
@every_placement
@every_dtype
def test_logits_are_the_bases_at_the_start(
    build: Build, logits: Logits, sidecar_config: Config, family: str, gate: str, placement: str, dtype: torch.dtype
) -> None:
    model, ids = build(family, dtype=dtype), some_ids()
    before = logits(model, ids)
    attach(model, sidecar_config(gate=gate, placement=placement))
    after = logits(model, ids)
    assert after.dtype == dtype
    assert torch.equal(after, before)


@every_family
@every_placement
@every_dtype
def test_off_is_the_base_bit_for_bit(
    build: Build,
    logits: Logits,
    sidecar_config: Config,
    randomize: Randomize,
    family: str,
    placement: str,
    dtype: torch.dtype,
) -> None:
    model, ids = build(family, dtype=dtype), some_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    before = logits(model, ids, mask)
    blocks = list(blocks_of(model))
    frozen = dict(model.named_parameters())
    cast(Any, model).lm_head.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in frozen.items()}
    assert len(set(flags.values())) == 2
    patch = attach(model, sidecar_config(placement=placement))
    randomize(patch)

    patched = logits(model, ids, mask)
    assert largest(patched, before) > 0.5
    with patch_disabled(model):
        assert torch.equal(logits(model, ids, mask), before)
    assert torch.equal(logits(model, ids, mask), patched)
    set_gate(model, "off")
    assert torch.equal(logits(model, ids, mask), before)
    set_gate(model, "on")
    assert largest(logits(model, ids, mask), patched) > 0.05
    assert largest(logits(model, ids, mask), before) > 0.05
    set_gate(model, "learned")
    assert torch.equal(logits(model, ids, mask), patched)
    assert not any(parameter.requires_grad for _, parameter in base_parameters(model))

    assert detach(model) is patch
    assert torch.equal(logits(model, ids, mask), before)
    assert all(a is b for a, b in zip(blocks_of(model), blocks, strict=True))
    after = dict(model.named_parameters())
    assert after.keys() == frozen.keys()
    assert all(after[name] is frozen[name] for name in frozen)
    assert {name: parameter.requires_grad for name, parameter in after.items()} == flags
    assert not body_of(model)._forward_pre_hooks
    assert not any(isinstance(module, PatchedBlock) for module in model.modules())

    attach(model, patch)
    assert torch.equal(logits(model, ids, mask), patched)


@every_dtype
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_training_touches_the_sidecars_alone(
    build: Build, sidecar_config: Config, family: str, dtype: torch.dtype
) -> None:
    model, ids = build(family, dtype=dtype), some_ids(4, 12)
    patch = attach(model, sidecar_config())
    before = base_sha256(model)
    base = dict(model.named_parameters())
    assert not {id(p) for p in patch.parameters()} & {id(p) for p in model.parameters()}
    assert not any("sidecar" in name for name in base)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in patch.parameters())
    optimizer = torch.optim.AdamW(patch.parameters(), lr=1e-2)
    start = patch_state(patch)
    losses = []
    for _ in range(8):
        out = model(ids, use_cache=False)
        assert out.logits.dtype == dtype
        loss = nn.functional.cross_entropy(out.logits.float()[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in patch.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all(), name
        assert all(p.grad is None and not p.requires_grad for p in base.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, tensor in patch_state(patch).items():
        assert torch.equal(tensor, start[name]) is name.endswith("channels"), name
    assert base_sha256(model) == before
    with patch_disabled(model):
        assert not model(ids, use_cache=False).logits.requires_grad
    detach(model)
    assert base_sha256(model) == before


@every_family
def test_every_way_of_calling_sees_the_mask(
    build: Build, logits: Logits, sidecar_config: Config, randomize: Randomize, family: str
) -> None:
    model, ids = build(family), some_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    randomize(attach(model, sidecar_config()))
    expected = logits(model, ids, mask, position_ids=None)
    assert largest(logits(model, ids, position_ids=None), expected) > 1e-3
    with torch.no_grad():
        embedded = cast(Any, model).get_input_embeddings()(ids)
        head, body = head_of(model), body_of(model)
        ways = {
            "embeddings": model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits,
            "body, by position": head(
                (body(ids, None, mask) if family == "gpt2" else body(ids, mask)).last_hidden_state
            ),
            "boolean mask": model(ids, attention_mask=mask.bool(), use_cache=False).logits,
            "with a cache": model(ids, attention_mask=mask).logits,
        }
    for way, found in ways.items():
        assert largest(found, expected) <= ROUNDING, way
    # The mask of one call must not stay for the next.
    assert largest(logits(model, ids[:, :6]), logits(model, ids)[:, :6]) <= ROUNDING


def test_a_mask_per_pair_of_tokens_is_refused_only_where_it_is_used(
    build: Build, sidecar_config: Config, randomize: Randomize, logits: Logits
) -> None:
    model, ids = build("llama"), some_ids(2, 6)
    mask = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)
    base = model(ids, attention_mask=mask, use_cache=False).logits
    randomize(attach(model, sidecar_config()))
    with pytest.raises(ValueError, match=r"\(batch, time\).*two-dimensional"):
        model(ids, attention_mask=mask, use_cache=False)
    with patch_disabled(model):
        assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, base)
    detach(model)
    randomize(attach(model, sidecar_config(gate="token")))
    assert largest(model(ids, attention_mask=mask, use_cache=False).logits, logits(model, ids)) <= ROUNDING


@every_family
def test_another_patch_on_the_same_base(
    build: Build, logits: Logits, sidecar_config: Config, randomize: Randomize, family: str
) -> None:
    """Of another gate, placement and set of layers, too."""
    model, ids = build(family), some_ids()
    base = logits(model, ids)
    one = randomize(attach(model, sidecar_config()), seed=1)
    other = randomize(Patch(16, 3, sidecar_config(gate="token", placement="coupled", layers=[2, 0])), seed=2)
    assert other.layers == [0, 2]
    with_one = logits(model, ids)
    with active_patch(model, other):
        with_other = logits(model, ids)
        with patch_disabled(model):
            assert torch.equal(logits(model, ids), base)
        assert torch.equal(logits(model, ids), with_other)
    assert torch.equal(logits(model, ids), with_one)
    with pytest.raises(RuntimeError, match="boom"), active_patch(model, other):
        raise RuntimeError("boom")
    assert torch.equal(logits(model, ids), with_one)
    detach(model)
    attach(model, other)
    assert torch.equal(logits(model, ids), with_other)
    assert largest(with_one, with_other) > 0.05
    for width, blocks, words in ((16, 2, "2 blocks.*has 3"), (8, 3, "width of 8.*width is 16")):
        with pytest.raises(ValueError, match=words), active_patch(model, Patch(width, blocks, sidecar_config())):
            pass
    assert torch.equal(logits(model, ids), with_other)
    assert patch_state(one) != {}
