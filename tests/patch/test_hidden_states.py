"""The states and attentions that transformers records of a patched model are those of the patched model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from batches import left_padded
from torch import Tensor, nn

from revpatch.config import SidecarConfig
from revpatch.patch.families import FAMILIES, blocks_of
from revpatch.patch.patched_model import attach, detach, patch_disabled, set_gate, switchboard

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))


def _entering(model: Any, call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What the call returns, and the input of each block in it."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in blocks_of(model)]
    out = call()
    for hook in hooks:
        hook.remove()
    return out, seen


def _equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...] | list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_family
@pytest.mark.parametrize("recorded_before", [False, True], ids=["fresh", "recorded before"])
@torch.no_grad()
def test_recorded_states_are_what_the_blocks_hand_on(
    build: Callable[..., nn.Module],
    sidecar_config: Callable[..., SidecarConfig],
    randomize: Callable[..., Any],
    family: str,
    recorded_before: bool,
) -> None:
    """transformers hooks the blocks when it first records, which may be before a patch is attached or after."""
    model: Any = build(family)
    model.set_attn_implementation("eager")
    ids, mask = left_padded(6)
    knobs = {"attention_mask": mask, "use_cache": False, "output_attentions": True}

    def call(states: Any = True) -> Any:
        return model(ids, **knobs, output_hidden_states=states)

    if recorded_before:
        call()
    randomize(attach(model, sidecar_config(layers=[0, 2])))
    recorded = {}
    for mode in ("learned", "on", "off"):
        set_gate(model, cast(Any, mode))
        out, entering = _entering(model, call)
        assert _equal(out.hidden_states[:3], entering)
        assert torch.equal(model.lm_head(out.hidden_states[3]), out.logits)
        some = call([1, -2]).hidden_states
        assert [state is not None for state in some] == [False, True, True, False]
        assert _equal(some[1:3], out.hidden_states[1:3])
        recorded[mode] = out
    off, learned = recorded["off"], recorded["learned"]
    assert not torch.equal(learned.hidden_states[1], off.hidden_states[1])
    assert len(learned.attentions) == 3
    assert torch.equal(learned.attentions[0], off.attentions[0]), "there is no sidecar before it"
    assert not torch.equal(learned.attentions[1], off.attentions[1])
    detach(model)
    base = call()
    assert _equal(base.hidden_states, off.hidden_states) and _equal(base.attentions, off.attentions)


@every_family
@pytest.mark.parametrize("gate", ["prefix", "token"])
def test_states_recorded_by_generate(patched: Callable[..., Any], family: str, gate: str) -> None:
    """Step by step with a cache, as in one call without."""
    model = patched(family, gate=gate, strength=0.3)
    ids = left_padded(6)[0][1:2]
    knobs = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, **knobs, output_hidden_states=True, return_dict_in_generate=True)
    with torch.no_grad():
        whole = model(out.sequences[:, :-1], output_hidden_states=True, use_cache=False).hidden_states
    for layer, expected in enumerate(whole):
        found = torch.cat([step[layer] for step in out.hidden_states], 1)
        assert (found - expected).abs().max() <= 1e-5
    with patch_disabled(model):
        base = model(out.sequences[:, :-1], output_hidden_states=True, use_cache=False).hidden_states
    assert (base[1] - whole[1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_recording_while_blocks_are_recomputed(patched: Callable[..., Any], family: str) -> None:
    """Recomputing in the backward pass records nothing a second time, and changes no gradient."""
    model, ids = patched(family), left_padded(6)[0]
    patch = switchboard(model).attached
    gradients = []
    for checkpointing in (False, True):
        switchboard(model).checkpointing = checkpointing
        patch.zero_grad()
        out = model(ids, output_hidden_states=True, use_cache=False)
        sum(state.square().mean() for state in out.hidden_states).backward()
        assert len(out.hidden_states) == 4
        gradients.append([parameter.grad.clone() for parameter in patch.parameters()])
    assert _equal(gradients[1], gradients[0])
