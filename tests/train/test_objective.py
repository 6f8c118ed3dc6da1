"""The objective, term by term and in its gradients, against the formulas written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from objective_oracle import ALL, WEIGHTS, World, check, make_world, plain_pass
from torch import Tensor
from toy import make_it_look_trained

from revpatch.patch.families import blocks_of
from revpatch.patch.patched_model import PatchedBlock, base_sha256, patch_state, switchboard
from revpatch.step.objective import TERMS


@pytest.fixture
def world() -> World:
    return make_world()


def test_the_oracle_without_sidecars_is_the_base(world: World) -> None:
    with torch.no_grad():
        expected = world.plain(world.new).logits
        torch.testing.assert_close(plain_pass(world.plain, {}, world.new)["logits"], expected)


@pytest.mark.parametrize("term", WEIGHTS)
def test_each_term_by_itself(world: World, term: str) -> None:
    check(world, {WEIGHTS[term]: 1.5})


def test_all_terms_at_a_temperature(world: World) -> None:
    output = check(world, ALL)
    values = dict(zip(TERMS, output.terms.tolist(), strict=True))
    total = values["lm"] + sum(ALL[knob] * values[term] for term, knob in WEIGHTS.items())
    assert values["loss"] == pytest.approx(total, rel=1e-5), "what is logged adds up"
    assert all(values.values())


def test_without_replay_there_is_the_new_text_and_the_penalties(world: World) -> None:
    output = check(world, ALL, replay=False)
    values = dict(zip(TERMS, output.terms.tolist(), strict=True))
    assert values["replay_lm"] == values["distill_kl"] == values["stats_drift"] == 0


def test_before_the_first_commit_the_teacher_is_the_base() -> None:
    check(make_world(committed=False), ALL)


@pytest.mark.parametrize(("weights", "asked"), [({}, 0), ({"distill_kl": 1.0}, 1), ({"stats_drift": 1.0}, 1)])
def test_the_teacher_is_asked_only_where_something_is_held_to_it(
    world: World, weights: dict[str, float], asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    ask = world.teacher.hidden
    monkeypatch.setattr(world.teacher, "hidden", lambda *arguments: calls.append(1) or ask(*arguments))
    check(world, {f"{term}_weight": weight for term, weight in weights.items()} | {"replay_loss_weight": 1.0})
    assert len(calls) == asked


def test_sidecars_on_some_layers_only() -> None:
    output = check(make_world(layers=[1]), ALL)
    assert output.layers.shape == (2, 1)


def test_the_teacher_keeps_the_patch_as_it_was_committed(world: World) -> None:
    before = world.teacher.hidden(world.replay).hidden
    make_it_look_trained(world.patch, seed=11)
    assert torch.equal(world.teacher.hidden(world.replay).hidden, before), "follow() takes a copy"
    world.teacher.follow(world.patch)
    assert not torch.equal(world.teacher.hidden(world.replay).hidden, before)
    assert world.teacher.patch is not None
    assert not any(p.requires_grad for p in world.teacher.patch.parameters())
    assert all(p.requires_grad for p in world.patch.parameters()), "the student learns on"


def test_the_teacher_hands_the_model_back_to_the_student(world: World) -> None:
    world.teacher.hidden(world.replay, keep_stats=True)
    board = switchboard(world.base)
    assert board.current().patch is world.patch
    assert board.here.recorder is None


def test_the_kl_vanishes_where_the_student_is_the_teacher(world: World) -> None:
    world.teacher.follow(world.patch)
    output = world.objective(distill_kl_weight=1.0, stats_drift_weight=1.0)(world.new, world.replay)
    values = dict(zip(TERMS, output.terms.tolist(), strict=True))
    assert abs(values["distill_kl"]) < 1e-12
    assert values["stats_drift"] < 1e-12


def test_only_the_sidecars_are_parameters_and_only_they_are_saved(world: World) -> None:
    objective = world.objective(**ALL)
    assert [p.data_ptr() for p in objective.parameters()] == [p.data_ptr() for p in world.patch.sidecars.parameters()]
    assert sum(v.numel() for v in objective.state_dict().values()) == sum(
        v.numel() for v in patch_state(world.patch).values()
    )
    assert {f"patch.sidecars.{name}" for name in patch_state(world.patch)} == objective.state_dict().keys()
    assert {name.rpartition(".")[2] for name, _ in objective.named_buffers()} == {"channels"}


def test_training_leaves_no_trace_in_the_base(world: World) -> None:
    before = base_sha256(world.base)
    objective = world.objective(**ALL)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.1)
    for _ in range(2):
        objective(world.new, world.replay).loss.backward()
        optimizer.step()
    assert base_sha256(world.base) == before
    assert all(p.grad is None and not p.requires_grad for p in world.base.parameters())


def test_an_engine_that_switches_to_training_mode_leaves_dropout_off(world: World) -> None:
    objective = world.objective(**ALL)
    calm = objective.eval()(world.new, world.replay).loss.item()
    assert objective.train()(world.new, world.replay).loss.item() == calm
    assert not world.base.training


@pytest.mark.parametrize("replay", [True, False])
def test_activation_checkpointing_changes_memory_alone(world: World, replay: bool) -> None:
    objective = world.objective(**ALL)
    calls = [0]
    for block in blocks_of(world.base):
        assert isinstance(block, PatchedBlock)
        block.block.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def run(checkpointing: bool) -> tuple[float, dict[str, Tensor], int]:
        switchboard(world.base).checkpointing = checkpointing
        objective.zero_grad()
        calls[0] = 0
        output = objective(world.new, world.replay if replay else None)
        forward = calls[0]
        output.loss.backward()
        return output.loss.item(), {k: v.clone() for k, v in world.gradients().items()}, calls[0] - forward

    loss, gradients, recomputed = run(False)
    loss_too, gradients_too, recomputed_too = run(True)
    assert loss_too == loss
    assert gradients_too.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradients_too[name], gradient), name
    assert recomputed == 0
    # None of the teacher's, and not the student's first block, before which nothing learns.
    assert recomputed_too == len(blocks_of(world.base)) - 1


@pytest.mark.parametrize("gate", ["prefix", "token"])
@pytest.mark.parametrize("placement", ["residual", "coupled"])
def test_a_bfloat16_base_gives_nearly_the_loss_of_a_float32_one(gate: Any, placement: Any) -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        world = make_world(gate=gate, placement=placement)
        world.base.to(dtype)
        world.patch.float()
        world.teacher.patch = world.teacher.patch.float() if world.teacher.patch else None
        output = world.objective(**ALL)(world.new, world.replay)
        output.loss.backward()
        assert all(
            gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in world.gradients().values()
        )
        losses.append(output.terms)
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0.01)
