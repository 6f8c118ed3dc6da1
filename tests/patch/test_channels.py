"""Channel coordinates: what is measured of a base, and that they are one map conjugated by a diagonal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from revpatch.config import SidecarConfig
from revpatch.patch.channels import SMALLEST, measure_channels
from revpatch.patch.patched_model import attach, load_tensors, patch_state
from revpatch.patch.sidecar import Sidecar

Build = Callable[..., Any]


def _ids(rows: int = 6, time: int = 12) -> torch.Tensor:
    return torch.randint(0, 50, (rows, time), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_they_are_the_rms_of_the_blocks_outputs_without_the_first_token(build: Build, family: str, rows: int) -> None:
    model = build(family)
    outputs: list[torch.Tensor] = []
    patch = attach(model, SidecarConfig(bottleneck=2))
    wrapped = [module for module in model.modules() if type(module).__name__ == "PatchedBlock"]
    hooks = [
        block.block.register_forward_hook(lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in wrapped
    ]
    with torch.no_grad():
        model(_ids(), use_cache=False)
    for hook in hooks:
        hook.remove()
    measure_channels(model, _ids(), rows)
    for layer in patch.layers:
        expected = outputs[layer][:, 1:].double().square().mean((0, 1)).sqrt()
        torch.testing.assert_close(patch.sidecar(layer).channels.double(), expected, rtol=1e-5, atol=0)


def test_the_patch_that_is_on_does_not_matter(patched: Build, build: Build) -> None:
    trained, fresh = patched("llama"), build("llama")
    plain = attach(fresh, SidecarConfig(bottleneck=4))
    measure_channels(trained, _ids())
    measure_channels(fresh, _ids())
    for name, value in patch_state(trained).items():
        if name.endswith("channels"):
            assert torch.equal(value, patch_state(plain)[name])


def test_a_silent_channel_is_not_divided_by_nothing(build: Build) -> None:
    model = build("gpt2")
    for block in model.transformer.h:
        for part in (block.attn.c_proj, block.mlp.c_proj):
            part.weight.data[:, 3] = 0
            part.bias.data[3] = 0
    model.transformer.wte.weight.data[:, 3] = 0
    model.transformer.wpe.weight.data[:, 3] = 0
    patch = attach(model, SidecarConfig(bottleneck=2))
    measure_channels(model, _ids())
    for layer in patch.layers:
        channels = patch.sidecar(layer).channels
        assert channels[3] == pytest.approx(SMALLEST * float(channels.median()), rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(3, dtype=torch.long), r"expected \(sequences, time\).*found \(3,\)"),
        (torch.zeros(3, 1, dtype=torch.long), r"found \(3, 1\)"),
        (torch.zeros(0, 5, dtype=torch.long), r"found \(0, 5\)"),
    ],
)
def test_other_tokens_are_refused(patched: Build, tokens: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure_channels(patched("gpt2"), tokens)


def test_a_base_of_nan_is_refused(build: Build) -> None:
    model = build("gpt2")
    model.transformer.h[1].mlp.c_fc.bias.data[0] = float("nan")
    attach(model, SidecarConfig(bottleneck=2))
    with pytest.raises(ValueError, match="block 1"):
        measure_channels(model, _ids())


@pytest.mark.parametrize("normalize", ["rms", "none"])
def test_other_coordinates_are_left_alone(patched: Build, normalize: str) -> None:
    model = patched("gpt2", normalize=normalize)
    before = patch_state(model)
    measure_channels(model, _ids())
    assert not any(name.endswith("channels") for name in before)
    assert all(torch.equal(value, before[name]) for name, value in patch_state(model).items())


def test_a_patch_carries_its_channels(patched: Build, build: Build) -> None:
    model = patched("llama")
    measure_channels(model, _ids())
    state = patch_state(model)
    other = attach(build("llama"), SidecarConfig(bottleneck=4))
    load_tensors(other, state)
    assert {name for name in state if name.endswith("channels")} == {"00.channels", "01.channels", "02.channels"}
    assert all(torch.equal(value, patch_state(other)[name]) for name, value in state.items())
    without = {name: value for name, value in state.items() if name != "01.channels"}
    with pytest.raises(ValueError, match=r"missing \['01.channels'\]"):
        load_tensors(other, without)


@pytest.mark.parametrize("placement", ["residual", "coupled"])
def test_scaling_a_channel_of_the_stream_scales_its_change_alone(randomize: Build, placement: str) -> None:
    """What F, G and the gate see doesn't depend on the units of a channel."""
    config = SidecarConfig.model_validate({"bottleneck": 5, "placement": placement})
    sidecar = randomize(Sidecar(16, config).double())
    u = torch.randn(2, 7, 16, dtype=torch.float64)
    units = torch.exp(2 * torch.randn(16, dtype=torch.float64))
    before = sidecar(u)
    sidecar.channels.mul_(units)
    after = sidecar(u * units)
    torch.testing.assert_close(after.update, before.update * units, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after.gate, before.gate, rtol=1e-12, atol=1e-12)
