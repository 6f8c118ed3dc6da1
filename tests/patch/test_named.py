"""Several patches on one model: which one is on, what switching touches, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revpatch.config import SidecarConfig
from revpatch.patch.families import FAMILIES
from revpatch.patch.patched_model import Patch, active_patch, attach, detach, patch_disabled, set_gate
from revpatch.patches import add_patch, patch_names, remove_patch, set_patch

Build = Callable[..., nn.Module]
Logits = Callable[..., Tensor]
Config = Callable[..., SidecarConfig]
Randomize = Callable[..., Any]


def _ids() -> Tensor:
    return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def two(build: Build, sidecar_config: Config, randomize: Randomize) -> Callable[..., tuple[Any, Patch, Patch]]:
    """two(family): a model with the patches "a", which is on, and "b", of another kind."""

    def _two(family: str = "gpt2") -> tuple[Any, Patch, Patch]:
        model = build(family)
        a = randomize(attach(model, sidecar_config(), name="a"), seed=1)
        b = randomize(add_patch(model, sidecar_config(gate="token", placement="coupled", layers=[2]), "b"), seed=2)
        return model, a, b

    return _two


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_patch_gives_what_it_gives_alone(
    build: Build, logits: Logits, two: Callable[..., tuple[Any, Patch, Patch]], family: str
) -> None:
    ids = _ids()
    base = logits(build(family), ids)
    model, a, b = two(family)
    alone = {}
    for name, patch in (("a", a), ("b", b)):
        other = build(family)
        attach(other, patch)
        alone[name] = logits(other, ids)
    assert torch.equal(logits(model, ids), alone["a"]), "the first one is on until another is chosen"
    for name in ("b", "a", "b"):
        set_patch(model, name)
        assert torch.equal(logits(model, ids), alone[name])
        with patch_disabled(model):
            assert torch.equal(logits(model, ids), base)
        assert torch.equal(logits(model, ids), alone[name])
    assert detach(model) is b
    assert torch.equal(logits(model, ids), base)


def test_the_gates_mode_outlives_a_switch(two: Callable[..., tuple[Any, Patch, Patch]], logits: Logits) -> None:
    model, _, b = two()
    ids = _ids()
    set_gate(model, "off")
    off = logits(model, ids)
    set_patch(model, "b")
    assert torch.equal(logits(model, ids), off)
    set_gate(model, "learned")
    with active_patch(model, b):
        expected = logits(model, ids)
    assert torch.equal(logits(model, ids), expected)
    assert not torch.equal(expected, off)


def test_switching_copies_nothing(two: Callable[..., tuple[Any, Patch, Patch]]) -> None:
    model, a, b = two()
    held = [(p, p.data_ptr()) for module in (model, a, b) for p in module.parameters()]
    rounds = []
    for _ in range(20):
        start = time.perf_counter()
        set_patch(model, "b")
        set_patch(model, "a")
        rounds.append((time.perf_counter() - start) / 2)
    assert min(rounds) < 1e-3
    now = [p for module in (model, a, b) for p in module.parameters()]
    assert all(p is was and p.data_ptr() == place for p, (was, place) in zip(now, held, strict=True))


def test_taking_one_off(two: Callable[..., tuple[Any, Patch, Patch]], logits: Logits) -> None:
    model, a, _ = two()
    with pytest.raises(ValueError, match=r"'a' is the chosen one.*set_patch another"):
        remove_patch(model, "a")
    set_patch(model, "b")
    expected = logits(model, _ids())
    assert remove_patch(model, "a") is a
    assert patch_names(model) == ["b"]
    assert torch.equal(logits(model, _ids()), expected)


def test_refusals_change_nothing(
    two: Callable[..., tuple[Any, Patch, Patch]], build: Build, sidecar_config: Config, logits: Logits
) -> None:
    model, _, _ = two()
    before = logits(model, _ids())
    for words, call in (
        ("no patch named 'c' on the model; there: a, b", lambda: set_patch(model, "c")),
        ("no patch named 'c' on the model; there: a, b", lambda: remove_patch(model, "c")),
        ("patch named 'b' already.*another name", lambda: add_patch(model, sidecar_config(), "b")),
        ("2 blocks, the model has 3", lambda: add_patch(model, Patch(16, 2, sidecar_config()), "c")),
        ("already: detach.* or add_patch", lambda: attach(model, sidecar_config())),
        ("carries no patch", lambda: add_patch(build(), sidecar_config(), "c")),
        ("carries no patch", lambda: patch_names(build())),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with patch_disabled(model):
        base = logits(model, _ids())
        for switch, to in ((set_patch, "b"), (remove_patch, "b"), (set_gate, "learned"), (set_gate, "on")):
            with pytest.raises(ValueError, match="is in force: leave it"):
                switch(model, to)
            assert torch.equal(logits(model, _ids()), base)
    assert patch_names(model) == ["a", "b"]
    assert torch.equal(logits(model, _ids()), before)


def test_sidecars_follow_their_blocks_to_another_device_in_their_own_dtype(
    build: Build, sidecar_config: Config
) -> None:
    model = build("llama")
    patches = [attach(model, sidecar_config()), add_patch(model, sidecar_config(layers=[1]), name="other")]
    model.to(torch.bfloat16)
    assert {(p.device.type, p.dtype) for patch in patches for p in patch.parameters()} == {("cpu", torch.float32)}
    model.to("meta")
    assert {(p.device.type, p.dtype) for patch in patches for p in patch.parameters()} == {("meta", torch.float32)}
