"""Differences, means and bypasses of patches are exact where they can be."""

from __future__ import annotations

import pytest
import torch
from made_up import patch_tensors, plus

from revpatch.config import SidecarConfig
from revpatch.patch.patched_model import Patch, load_tensors
from revpatch.surgery.combine import bypassed, check_finite, layers_with_sidecars, taken_out, weighted


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_taking_the_last_phase_out_is_the_state_before_it_to_the_bit() -> None:
    before, after = patch_tensors(1), patch_tensors(2, strength=30.0)
    assert equal(taken_out(after, after, before), before)


def test_taking_a_phase_out_keeps_what_later_ones_changed() -> None:
    before, after = patch_tensors(1), patch_tensors(2)
    newest = plus(after, 0.1, seed=3)
    found = taken_out(newest, after, before)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor - before[name], newest[name] - after[name], rtol=0, atol=1e-6)
        assert tensor.dtype == torch.float32


def test_weights_are_taken_as_they_are() -> None:
    a, b = patch_tensors(1), patch_tensors(2)
    assert equal(weighted([a, b], [1.0, 0.0]), a)
    assert equal(weighted([a, a], [0.5, 0.5]), a)
    for name, tensor in weighted([a, b], [1.0, 1.0]).items():
        expected = a[name] if name.endswith("channels") else a[name] + b[name]  # these are the base's
        torch.testing.assert_close(tensor, expected)
    assert equal(weighted([a, b], [0.25, 0.75]), weighted([b, a], [0.75, 0.25]))


@pytest.mark.parametrize("placement", ["residual", "coupled"])
def test_a_bypassed_sidecar_is_the_identity_to_the_bit_and_the_others_are_as_they_were(placement: str) -> None:
    tensors = patch_tensors(strength=1.0, placement=placement)
    patch = Patch(32, 2, SidecarConfig.model_validate({"bottleneck": 4, "placement": placement}))
    load_tensors(patch, bypassed(tensors, [1]))
    u = torch.randn(2, 5, 32)
    first, second = (patch.sidecar(layer) for layer in (0, 1))
    assert first is not None and second is not None
    assert torch.equal(second(u).hidden, u)
    assert not torch.equal(first(u).hidden, u)
    assert all(torch.equal(t, tensors[name]) for name, t in bypassed(tensors, [1]).items() if name.startswith("00."))


def test_what_is_not_there_or_not_finite_is_refused() -> None:
    tensors = patch_tensors()
    assert layers_with_sidecars(tensors) == [0, 1]
    with pytest.raises(ValueError, match=r"no sidecar after block 7.*blocks \[0, 1\]"):
        bypassed(tensors, [0, 7])
    tensors["00.coupling.log_scale"][0] = float("nan")
    with pytest.raises(ValueError, match=r"merge: 00\.coupling\.log_scale holds values that are not finite"):
        check_finite(tensors, "merge")
