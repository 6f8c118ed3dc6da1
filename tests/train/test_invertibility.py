"""The invertibility report: small for what can be undone, honest for what can't, and without a trace."""

from __future__ import annotations

import pytest
import torch
from toy import make_base

from revpatch.config import SidecarConfig
from revpatch.evaluation.proofs import measure_invertibility
from revpatch.patch.patched_model import attach, patch_state

TOKENS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("placement", ["residual", "coupled"])
@pytest.mark.parametrize("gate", ["prefix", "seq", "token"])
def test_a_mild_patch_is_undone_and_left_as_it_was(placement: str, gate: str) -> None:
    base = make_base(300)
    patch = attach(base, SidecarConfig(bottleneck=8, placement=placement, gate=gate))  # type: ignore[arg-type]
    before = patch_state(patch)
    found = measure_invertibility(base, patch, TOKENS, noise=0.02)
    assert found.converged == found.sidecars == 2
    assert 0 < found.error < 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in patch_state(patch).items())


def test_a_patch_that_is_no_contraction_is_reported_unless_coupled() -> None:
    for placement, undone in (("residual", False), ("coupled", True)):
        base = make_base(300)
        patch = attach(base, SidecarConfig(bottleneck=8, placement=placement))  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in patch.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        found = measure_invertibility(base, patch, TOKENS)
        assert (found.converged == found.sidecars) is undone
        assert ("no contraction" in str(found)) is not undone
