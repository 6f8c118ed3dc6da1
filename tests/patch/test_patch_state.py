"""A patch's tensors: out of it and in again exactly, all or nothing, small, by their block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patching import (
    Build,
    Config,
    Logits,
    Randomize,
    every_gate,
    every_placement,
    largest,
    some_ids,
)

from revpatch.config import SidecarConfig
from revpatch.patch.patched_model import (
    Patch,
    attach,
    load_tensors,
    patch_state,
)
from revpatch.patches import save_patch


@every_gate
@every_placement
def test_state_round_trips_exactly(
    build: Build, logits: Logits, sidecar_config: Config, randomize: Randomize, gate: str, placement: str
) -> None:
    model, ids = build("gpt2"), some_ids()
    config = sidecar_config(gate=gate, placement=placement)
    patch = randomize(attach(model, config))
    expected, state = logits(model, ids), patch_state(model)
    assert list(state) == sorted(state)
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in patch.state_dict().values())
    for tensor in state.values():
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert not tensor.requires_grad
        assert tensor.is_contiguous()
    frozen = {name: tensor.clone() for name, tensor in state.items()}
    identities = [id(p) for p in patch.parameters()]
    randomize(patch, seed=9)
    assert all(torch.equal(state[name], frozen[name]) for name in state), "the state must be a copy"
    assert largest(logits(model, ids), expected) > 0.05
    load_tensors(model, state)
    assert torch.equal(logits(model, ids), expected)
    assert [id(p) for p in patch.parameters()] == identities, "an optimizer holds these"
    assert all(p.requires_grad for p in patch.parameters())
    fresh = Patch(16, 3, config)
    load_tensors(fresh, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in patch_state(fresh).items())


def _missing(state: dict[str, Any]) -> None:
    del state[next(reversed(state))]


def _unknown(state: dict[str, Any]) -> None:
    state["07.coupling.f.up.weight"] = torch.zeros(2)


def _mis_shaped(state: dict[str, Any]) -> None:
    name = next(reversed(state))
    state[name] = torch.zeros(*state[name].shape, 1)


def _broadcast(state: dict[str, Any]) -> None:
    state["02.coupling.g.up.weight"] = state["02.coupling.g.up.weight"][:1]


def _integers(state: dict[str, Any]) -> None:
    name = next(reversed(state))
    state[name] = state[name].long()


def _size_of_zero(state: dict[str, Any]) -> None:
    state["01.channels"] = torch.zeros(16)


def _size_that_is_no_number(state: dict[str, Any]) -> None:
    state["01.channels"] = torch.full((16,), float("nan"))


def _no_tensor(state: dict[str, Any]) -> None:
    name = next(reversed(state))
    state[name] = state[name].tolist()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_missing, r"missing \['02\.gates\.0\.weight'\], unknown none"),
        (_unknown, r"missing none, unknown \['07\.coupling\.f\.up\.weight'\]"),
        (_mis_shaped, r"02\.gates\.0\.weight: expected shape \(16,\), found \(16, 1\)"),
        (_broadcast, r"02\.coupling\.g\.up\.weight: expected shape \(8, 4\), found \(1, 4\)"),
        (_integers, r"02\.gates\.0\.weight: expected a tensor of floats, found torch\.int64"),
        (_size_of_zero, r"01\.channels: expected the sizes of a base's channels, all above 0"),
        (_size_that_is_no_number, r"01\.channels: expected the sizes of a base's channels, all above 0"),
        (_no_tensor, r"02\.gates\.0\.weight: expected a tensor of floats, found .*list"),
    ],
)
def test_loading_is_all_or_nothing(
    sidecar_config: Config, randomize: Randomize, spoil: Callable[[dict[str, Any]], None], words: str
) -> None:
    patch = randomize(Patch(16, 3, sidecar_config()))
    before = patch_state(patch)
    other: dict[str, Any] = patch_state(randomize(Patch(16, 3, sidecar_config()), seed=2))
    spoil(other)
    with pytest.raises(ValueError, match=words):
        load_tensors(patch, other)
    after = patch_state(patch)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_state_of_another_kind_of_patch_is_refused(sidecar_config: Config) -> None:
    state = patch_state(Patch(16, 3, sidecar_config(placement="coupled")))
    for config in (sidecar_config(), sidecar_config(placement="coupled", layers=[0, 1])):
        with pytest.raises(ValueError, match="check gate, placement and layers"):
            load_tensors(Patch(16, 3, config), state)
    with pytest.raises(ValueError, match="expected shape"):
        load_tensors(Patch(16, 3, sidecar_config(placement="coupled", bottleneck=5)), state)


def test_a_patch_of_gpt2_is_small(tmp_path: Path) -> None:
    """Five megabytes in float32 at the defaults, against the 498 MB of GPT-2."""
    patch = Patch(768, 12, SidecarConfig())
    save_patch(patch, tmp_path / "patch.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in patch_state(patch).values())
    assert (tmp_path / "patch.safetensors").stat().st_size <= 5e6


def test_sidecars_are_found_by_their_block(sidecar_config: Config, randomize: Randomize) -> None:
    patch = randomize(Patch(16, 3, sidecar_config(layers=[2, 0])))
    assert patch.layers == [0, 2]
    assert patch.log_scales().tolist() == [patch.sidecar(layer).coupling.log_scale.item() for layer in (0, 2)]
    assert patch.sidecar(1) is None
