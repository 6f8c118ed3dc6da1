"""The objective, term by term and in its gradients, against the formulas written out in float64 on a plain GPT-2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import make_base, make_it_look_trained

from revpatch.config import ObjectiveConfig, SidecarConfig
from revpatch.patch.families import blocks_of
from revpatch.patch.patched_model import Patch, PatchedBlock, attach, base_sha256, patch_state, switchboard
from revpatch.step.objective import TERMS, PatchObjective, StepOutput
from revpatch.step.teacher import Teacher

VOCAB, TIME, NEW, REPLAY, INIT_SCALE = 83, 9, 3, 2, 0.7
WEIGHTS = {
    "replay_lm": "replay_loss_weight",
    "distill_kl": "distill_kl_weight",
    "gate_l1": "gate_l1_weight",
    "patch_l2": "patch_l2_weight",
    "scale_l2": "scale_l2_weight",
    "stats_drift": "stats_drift_weight",
}
"""The term and the knob that weighs it."""
OFF = dict.fromkeys(WEIGHTS.values(), 0.0)
ALL = dict(zip(WEIGHTS.values(), (0.8, 1.3, 0.6, 0.05, 0.9, 0.4), strict=True)) | {"distill_temperature": 1.7}


@dataclass
class World:
    """A patched base with a committed patch behind it, in float64, and the same base without a patch."""

    base: nn.Module
    patch: Patch
    teacher: Teacher
    plain: nn.Module
    committed: dict[str, Tensor]
    new: Tensor
    replay: Tensor

    def objective(self, **weights: float) -> PatchObjective:
        return PatchObjective(self.base, self.patch, self.teacher, ObjectiveConfig(**(OFF | weights)))

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.patch.sidecars.named_parameters() if p.grad is not None}


def make_world(committed: bool = True, **sidecar: Any) -> World:
    base, plain = make_base(VOCAB).double(), make_base(VOCAB).double()
    patch = attach(base, SidecarConfig(bottleneck=4, init_scale=INIT_SCALE, **sidecar)).double()
    teacher = Teacher(base)
    tensors: dict[str, Tensor] = {}
    if committed:
        make_it_look_trained(patch, seed=5)
        teacher.follow(patch)
        tensors = {name: p.detach().clone() for name, p in patch.sidecars.state_dict().items()}
    make_it_look_trained(patch, seed=6)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(VOCAB, (NEW + REPLAY, TIME), generator=generator)
    return World(base, patch, teacher, plain, tensors, tokens[:NEW], tokens[NEW:])


def plain_pass(model: nn.Module, sidecars: dict[str, Tensor], tokens: Tensor) -> dict[str, Any]:
    """A GPT-2 with the sidecar formulas between its blocks: logits, and per layer gates, updates, outputs."""
    body = model.transformer
    gates, updates, outputs = [], [], []
    h = body.wte(tokens) + body.wpe(torch.arange(tokens.shape[1]))
    for layer, block in enumerate(body.h):
        u = block(h)
        h = u
        p = {name[3:]: tensor for name, tensor in sidecars.items() if name.startswith(f"{layer:02d}.")}
        if p:
            gate, update = plain_sidecar(p, u)
            h = u + update
            gates.append(gate)
            updates.append(update)
        outputs.append(h)
    return {"logits": model.lm_head(body.ln_f(h)), "gates": gates, "updates": updates, "outputs": outputs}


def plain_sidecar(p: dict[str, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    def n(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def mlp(name: str, x: Tensor) -> Tensor:
        inner = F.gelu(x @ p[f"coupling.{name}.down.weight"].T + p[f"coupling.{name}.down.bias"])
        return inner @ p[f"coupling.{name}.up.weight"].T + p[f"coupling.{name}.up.bias"]

    u = u / p["channels"]
    means = torch.stack([n(u)[:, : t + 1].mean(1) for t in range(u.shape[1])], dim=1)
    gate = torch.sigmoid(means @ p["gates.0.weight"] + p["gates.0.bias"])
    half, s = u.shape[-1] // 2, p["coupling.log_scale"].exp()
    a, b = u[..., :half], u[..., half:]
    moved_a = a + s * mlp("f", n(b))
    moved_b = b + s * mlp("g", n(moved_a))
    return gate, p["channels"] * gate[..., None] * (torch.cat([moved_a, moved_b], -1) - u)


def lm(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def oracle(world: World, sidecars: dict[str, Tensor], weights: dict[str, float], replay: bool = True) -> dict[str, Any]:
    """Every term by its definition; the two corpora go through the model one after the other."""
    new = plain_pass(world.plain, sidecars, world.new)
    parts = [new]
    terms = {"lm": lm(new["logits"], world.new)}
    if replay:
        old = plain_pass(world.plain, sidecars, world.replay)
        with torch.no_grad():
            taught = plain_pass(world.plain, world.committed, world.replay)
        parts.append(old)
        temperature = weights.get("distill_temperature", 1.0)
        p, q = (torch.softmax(x["logits"][:, :-1] / temperature, -1) for x in (taught, old))
        terms["replay_lm"] = lm(old["logits"], world.replay)
        terms["distill_kl"] = temperature**2 * (p * (p / q).log()).sum(-1).mean()
        drifts = []
        for mine, his in zip(old["outputs"], taught["outputs"], strict=True):
            mean = (mine.mean(1) - his.mean(1)).pow(2).sum(-1)
            deviation = (mine.var(1, correction=0).sqrt() - his.var(1, correction=0).sqrt()).pow(2).sum(-1)
            drifts.append(((mean + deviation) / mine.shape[-1]).mean())
        terms["stats_drift"] = torch.stack(drifts).mean()
    per_layer = range(len(new["gates"]))
    gates = [torch.cat([part["gates"][i] for part in parts]) for i in per_layer]
    changes = [torch.cat([part["updates"][i] for part in parts]).pow(2).sum(-1).mean() for i in per_layer]
    terms["gate_l1"] = torch.stack([gate.mean() for gate in gates]).mean()
    terms["patch_l2"] = torch.stack(changes).mean()
    scales = torch.cat([tensor for name, tensor in sidecars.items() if name.endswith("log_scale")])
    terms["scale_l2"] = (scales - torch.tensor(INIT_SCALE, dtype=torch.float64).log()).pow(2).mean()
    loss = terms["lm"] + sum(weights.get(knob, 0.0) * terms[term] for term, knob in WEIGHTS.items() if term in terms)
    layers = torch.stack([torch.stack([g.mean() for g in gates]), torch.stack(changes).sqrt()])
    return {"loss": loss, **terms, "layers": layers.detach()}


def check(world: World, weights: dict[str, float], replay: bool = True) -> StepOutput:
    """Values and gradients of the objective against the oracle's."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in world.patch.sidecars.named_parameters()}
    expected = oracle(world, leaves | dict(world.patch.sidecars.named_buffers()), weights, replay)
    expected["loss"].backward()
    output = world.objective(**weights)(world.new, world.replay if replay else None)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected["loss"].item(), rel=1e-10)
    for term, value in zip(TERMS, output.terms.tolist(), strict=True):
        if term in ("stats_drift", "distill_kl") and not weights.get(f"{term}_weight"):
            assert value == 0, "not computed where nobody asks for it"
        else:
            known = expected[term].item() if term in expected else 0.0
            assert value == pytest.approx(known, rel=1e-5, abs=1e-9), term
    torch.testing.assert_close(output.layers.double(), expected["layers"], rtol=1e-5, atol=1e-7)
    found = world.gradients()
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        if leaf.grad is None:
            assert not found[name].any(), name
        else:
            torch.testing.assert_close(found[name], leaf.grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    return output


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


def test_sidecars_on_some_layers_only() -> None:
    assert check(make_world(layers=[1]), ALL).layers.shape == (2, 1)


@pytest.mark.parametrize(("weights", "asked"), [({}, 0), ({"distill_kl": 1.0}, 1), ({"stats_drift": 1.0}, 1)])
def test_the_teacher_is_asked_only_where_something_is_held_to_it(
    world: World, weights: dict[str, float], asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    ask = world.teacher.hidden
    monkeypatch.setattr(world.teacher, "hidden", lambda *arguments: calls.append(1) or ask(*arguments))
    check(world, {f"{term}_weight": weight for term, weight in weights.items()} | {"replay_loss_weight": 1.0})
    assert len(calls) == asked


def test_the_teacher_keeps_the_patch_as_it_was_committed(world: World) -> None:
    before = world.teacher.hidden(world.replay).hidden
    make_it_look_trained(world.patch, seed=11)
    assert torch.equal(world.teacher.hidden(world.replay).hidden, before), "follow() takes a copy"
    world.teacher.follow(world.patch)
    assert not torch.equal(world.teacher.hidden(world.replay).hidden, before)
    assert world.teacher.patch is not None
    assert not any(p.requires_grad for p in world.teacher.patch.parameters())
    assert all(p.requires_grad for p in world.patch.parameters()), "the student learns on"


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


@pytest.mark.parametrize(("gate", "placement"), [("prefix", "residual"), ("token", "coupled")])
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
