"""Bases: where the table of families finds their parts, which heads are refused, and what identifies one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from patching import (
    Build,
    Config,
    every_dtype,
    every_family,
    some_ids,
)
from torch import Tensor, nn

from revpatch.patch.families import blocks_of, body_of, check_head, head_of, width_of
from revpatch.patch.patched_model import (
    attach,
    base_parameters,
    base_sha256,
    detach,
)


@every_family
@pytest.mark.parametrize("tied", [False, True])
def test_the_table_names_the_parts(build: Build, family: str, tied: bool) -> None:
    model, ids = build(family, tied), some_ids()
    assert width_of(model) == 16
    assert len(blocks_of(model)) == 3
    hidden = body_of(model)(ids, use_cache=False).last_hidden_state
    assert torch.equal(hidden @ head_of(model).weight.T, model(ids, use_cache=False).logits)


def test_a_head_that_is_not_linear_is_refused(build: Build) -> None:
    model = cast(Any, build("llama"))
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"final_logit_softcapping = 30\.0"):
        head_of(model)
    model.config.final_logit_softcapping = None
    model.lm_head = nn.Linear(16, 61)
    with pytest.raises(ValueError, match="without a bias"):
        head_of(model)


@every_family
@every_dtype
def test_logits_are_held_against_the_head(build: Build, family: str, dtype: torch.dtype) -> None:
    """Whatever the key is called that makes more of them than the head's product."""
    model = cast(Any, build(family, dtype=dtype))
    check_head(model)
    for change in (lambda x: x * 0.9, lambda x: 30 * torch.tanh(x / 30) * 1.02, lambda x: x + 0.3):

        def changed(_: nn.Module, __: Any, out: Any, change: Callable[[Tensor], Tensor] = change) -> None:
            out.logits = change(out.logits)

        hook = model.register_forward_hook(changed)
        with pytest.raises(ValueError, match=r"logits are not its head's product.*scaled, capped or shifted"):
            check_head(model)
        hook.remove()
    check_head(model)
    assert not body_of(model)._forward_hooks


@every_family
@pytest.mark.parametrize("tied", [False, True])
def test_base_sha256(build: Build, sidecar_config: Config, family: str, tied: bool) -> None:
    model = build(family, tied)
    exact, rounded = base_sha256(model), base_sha256(model, rounded=True)
    names = [name for name, _ in base_parameters(model)]
    assert names == sorted(names)
    assert ("lm_head.weight" in names) is not tied
    assert exact != rounded
    assert base_sha256(build(family, tied)) == exact
    assert base_sha256(build(family, tied, seed=1)) != exact

    patch = attach(model, sidecar_config())
    assert base_sha256(model) == exact
    assert base_sha256(model, rounded=True) == rounded
    assert [name for name, _ in base_parameters(model)] == names
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.fill_(1.0)
    assert base_sha256(model) == exact
    detach(model)
    assert base_sha256(model) == exact

    cast_down = build(family, tied, dtype=torch.bfloat16)
    assert base_sha256(cast_down, rounded=True) == rounded
    assert base_sha256(cast_down) == rounded
    for name, parameter in base_parameters(model):
        with torch.no_grad():
            value = parameter.view(-1)[-1].clone()
            parameter.view(-1)[-1] = value + 0.5
            assert base_sha256(model) != exact, name
            assert base_sha256(model, rounded=True) != rounded, name
            parameter.view(-1)[-1] = value
    with torch.no_grad():
        last = list(model.parameters())[-1].view(-1)
        last[0] = torch.nextafter(last[0], last[0] + 1)
    assert base_sha256(model) != exact
