"""What is seen of a forward pass, and computing parts of it once more: neither changes anything."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from patching import (
    Build,
    Config,
    Randomize,
    some_ids,
)
from torch import Tensor, nn

from revpatch.patch.families import blocks_of, body_of, head_of
from revpatch.patch.patched_model import (
    attach,
    patch_disabled,
    recording,
    switchboard,
)
from revpatch.patch.sidecar import SidecarOutput


class _Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, tuple[Tensor, ...]]] = []
        self.plain: list[tuple[int, Tensor]] = []

    def measure(self, output: SidecarOutput) -> tuple[Tensor, ...]:
        return output.gate, output.update

    def record(self, layer: int, hidden: Tensor, measured: tuple[Tensor, ...]) -> None:
        self.seen.append((layer, hidden, measured))

    def record_plain(self, layer: int, hidden: Tensor) -> None:
        self.plain.append((layer, hidden))


def test_recording_shows_what_the_blocks_hand_on(build: Build, sidecar_config: Config, randomize: Randomize) -> None:
    model, ids = build("qwen2"), some_ids()
    randomize(attach(model, sidecar_config(layers=[0, 2])))
    entering: list[Tensor] = []
    hooks = [
        block.block.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        for block in cast(Any, blocks_of(model))
    ]
    with recording(model, recorder := _Recorder()):
        out = model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert [layer for layer, *_ in recorder.seen] == [0, 2]
    assert [layer for layer, _ in recorder.plain] == [1]
    assert recorder.seen[0][1] is entering[1]
    assert recorder.plain[0][1] is entering[2]
    last = recorder.seen[1][1]
    assert torch.equal(head_of(model)(cast(Any, body_of(model)).norm(last)), out.logits)
    with recording(model, recorder := _Recorder()), patch_disabled(model):
        model(ids, use_cache=False)
    assert [layer for layer, _ in recorder.plain] == [0, 1, 2]
    model(ids, use_cache=False)
    assert len(recorder.plain) == 3
    assert not recorder.seen


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("recorded", [False, True], ids=["alone", "recorded"])
@pytest.mark.parametrize("use_cache", [False, None], ids=["no cache", "default"])
def test_checkpointing_changes_memory_only(
    build: Build, sidecar_config: Config, randomize: Randomize, family: str, recorded: bool, use_cache: bool | None
) -> None:
    model, ids = build(family), some_ids()
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    patch = randomize(attach(model, sidecar_config()))
    runs: list[int] = []
    for block in cast(Any, blocks_of(model)):
        block.block.register_forward_pre_hook(lambda *_: runs.append(1))

    def step() -> tuple[float, list[Tensor], int]:
        patch.zero_grad()
        runs.clear()
        recorder = _Recorder()
        if recorded:
            with recording(model, recorder):
                out = model(ids, attention_mask=mask, use_cache=use_cache).logits
        else:
            out = model(ids, attention_mask=mask, use_cache=use_cache).logits
        loss = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for _, _, (gate, update) in recorder.seen:
            loss = loss + gate.mean() + update.square().mean()
        loss.backward()
        assert len(recorder.seen) == (3 if recorded else 0)
        return loss.item(), [p.grad.clone() for p in patch.parameters()], len(runs)

    switchboard(model).recompute_sidecars = False
    plain = step()
    switchboard(model).recompute_sidecars = True
    recomputed = step()
    switchboard(model).checkpointing = True
    saved = step()
    for other in (recomputed, saved):
        assert other[0] == plain[0]
        for a, b in zip(other[1], plain[1], strict=True):
            assert torch.equal(a, b)
    assert recomputed[2] == plain[2]
    assert plain[2] == 3
    # The first block has nothing to learn before it, so it is not run again; a cache would grow if blocks were.
    assert saved[2] == (5 if use_cache is False else 3)
    with torch.no_grad():
        assert torch.isfinite(model(ids, use_cache=False).logits).all()
    assert all(parameter.grad is None for parameter in model.parameters())
