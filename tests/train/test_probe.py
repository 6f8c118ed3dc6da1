"""What is measured and shown beside the steps: held-out losses, invertibility, samples. It leaves no trace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy import POSITIONS, Toy, make_base, make_it_look_trained

from revpatch.config import ProbeSetConfig, SamplesConfig, SidecarConfig
from revpatch.evaluation.probe import Prober
from revpatch.evaluation.proofs import measure_invertibility
from revpatch.generate import MAX_PROMPTS, PROMPT_TOKENS, Sampler
from revpatch.patch.patched_model import Patch, attach, patch_disabled, patch_state, recording, switchboard
from revpatch.patch.sidecar import SidecarOutput
from revpatch.shards.shard_set import ShardSet
from revpatch.train.startup import load_frozen_base


@dataclass
class World:
    base: nn.Module
    patch: Patch
    shards: dict[str, ShardSet]

    def prober(self, rows: int = 4, **max_blocks: int | None) -> Prober:
        return Prober(
            self.base,
            [
                (ProbeSetConfig(name=name, shards="unused", max_blocks=limit), self.shards[name])
                for name, limit in max_blocks.items()
            ],
            rows,
        )

    def tokens(self, name: str, ids: list[int] | None = None) -> Tensor:
        shards = self.shards[name]
        return torch.from_numpy(shards.read(np.arange(len(shards)) if ids is None else np.array(ids)))


@pytest.fixture
def world(toy: Toy) -> World:
    base = make_base(len(toy.tokenizer))
    patch = make_it_look_trained(attach(base, SidecarConfig(bottleneck=4)), strength=0.3)
    return World(base, patch, {name: ShardSet(toy.shards(f"{name}_probe")) for name in ("first", "second")})


@torch.no_grad()
def plain_losses(base: nn.Module, tokens: Tensor) -> list[float]:
    """Each block by itself through Hugging Face's own loss."""
    return [base(row[None], labels=row[None], use_cache=False).loss.item() for row in tokens]


def test_the_losses_are_those_of_a_plain_forward_pass_with_labels(world: World) -> None:
    measured = world.prober(first=20, second=7).measure()
    assert list(measured) == ["first", "second"]
    assert [len(m.losses) for m in measured.values()] == [20, 7]
    for name, count in (("first", 20), ("second", 7)):
        ids = np.linspace(0, len(world.shards[name]) - 1, count).round().astype(int).tolist()
        expected = plain_losses(world.base, world.tokens(name, ids))
        np.testing.assert_allclose(measured[name].losses, expected, rtol=2e-6)
        assert measured[name].losses.dtype == np.float64
        assert measured[name].loss == pytest.approx(np.mean(expected), rel=1e-6)


def test_it_measures_the_patch_that_is_on(world: World) -> None:
    prober = world.prober(first=8)
    with_patch = prober.measure()["first"]
    make_it_look_trained(world.patch, seed=9, strength=0.3)
    other = prober.measure()["first"]
    assert abs(with_patch.losses - other.losses).min() > 1e-4
    with torch.no_grad():
        for name, parameter in world.patch.named_parameters():
            if ".up." in name:
                parameter.zero_()
    identity = prober.measure()["first"]
    with patch_disabled(world.base):
        expected = plain_losses(world.base, torch.from_numpy(prober.blocks["first"].astype(np.int64)))
    np.testing.assert_allclose(identity.losses, expected, rtol=2e-6)
    assert identity.changes == [0.0, 0.0]


class Keeper:
    """Keeps each sidecar's gate and change."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, ...]] = {}

    def measure(self, output: SidecarOutput) -> tuple[Tensor, ...]:
        return output.gate, output.update

    def record(self, layer: int, hidden: Tensor, measured: tuple[Tensor, ...]) -> None:
        self.seen[layer] = measured

    def record_plain(self, layer: int, hidden: Tensor) -> None:
        raise AssertionError("every block has a sidecar here")


def test_gates_and_changes_are_means_over_all_tokens(world: World) -> None:
    measured = world.prober(rows=3, first=10).measure()["first"]
    keeper = Keeper()
    with recording(world.base, keeper), torch.no_grad():
        ids = np.linspace(0, len(world.shards["first"]) - 1, 10).round().astype(int).tolist()
        world.base(world.tokens("first", ids), use_cache=False)
    outputs = [keeper.seen[layer] for layer in sorted(keeper.seen)]
    assert measured.gates == pytest.approx([gate.double().mean().item() for gate, _ in outputs], rel=1e-5)
    expected = [update.double().pow(2).sum(-1).mean().sqrt().item() for _, update in outputs]
    assert measured.changes == pytest.approx(expected, rel=1e-5)
    assert measured.gate == pytest.approx(np.mean(measured.gates))
    assert measured.patch_norm == pytest.approx(np.mean(measured.changes))


@pytest.mark.parametrize("wanted", [1, 5, 37])
def test_a_part_of_a_set_is_spread_evenly_over_all_of_it(world: World, wanted: int) -> None:
    everything = world.tokens("first")
    rows = world.prober(first=wanted).blocks["first"].astype(np.int64)
    found = [int((everything == torch.from_numpy(row)).all(1).nonzero()[0]) for row in rows]
    assert len(set(found)) == wanted
    assert found[0] == 0
    if wanted > 1:
        assert found[-1] == len(everything) - 1
        gaps = np.diff(found)
        assert gaps.max() - gaps.min() <= 1


def test_measuring_leaves_no_trace(world: World) -> None:
    tokens = world.tokens("first", [0, 1, 2])
    state = torch.random.get_rng_state()
    with torch.no_grad():
        before = world.base(tokens, use_cache=False).logits
    modes = [module.training for module in world.base.modules()]
    prober = world.prober(first=10)
    first, second = prober.measure()["first"], prober.measure()["first"]
    with torch.no_grad():
        after = world.base(tokens, use_cache=False).logits
    assert np.array_equal(first.losses, second.losses)
    assert torch.equal(before, after)
    assert [module.training for module in world.base.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    board = switchboard(world.base)
    assert board.here.recorder is None
    assert board.current().patch is world.patch
    parameters = [*world.base.parameters(), *world.patch.parameters()]
    assert all(parameter.grad is None for parameter in parameters)
    assert all(parameter.requires_grad for parameter in world.patch.parameters())
    assert torch.is_grad_enabled()


def test_a_training_step_goes_on_from_where_a_probe_interrupted_it(world: World) -> None:
    tokens = world.tokens("first", [0, 1])
    loss = world.base(tokens, labels=tokens, use_cache=False).loss
    world.prober(first=10).measure()
    loss.backward()
    assert all(parameter.grad is not None for parameter in world.patch.parameters())


TOKENS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize(("placement", "gate"), [("residual", "prefix"), ("residual", "seq"), ("coupled", "token")])
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


def test_prompts_are_the_configs_or_taken_from_the_held_out_sets(toy: Toy, tmp_path: Path) -> None:
    of = toy.config(tmp_path).base
    base = load_frozen_base(of, torch.device("cpu"))
    make_it_look_trained(attach(base, SidecarConfig(bottleneck=8)))
    blocks = {f"set{i}": np.full((2, 60), 40 + i) for i in range(MAX_PROMPTS + 2)}
    drawn = Sampler(base, of, SamplesConfig(max_new_tokens=4), blocks)
    assert drawn.prompts == [[40 + i] * PROMPT_TOKENS for i in range(MAX_PROMPTS)]
    assert len(drawn.write()) == MAX_PROMPTS

    long = "the patch learns " * POSITIONS
    given = Sampler(base, of, SamplesConfig(prompts=["the patch", long], max_new_tokens=200), blocks)
    state = torch.get_rng_state()
    short, cut = given.write()
    assert torch.equal(torch.get_rng_state(), state), "no random number was drawn"
    assert given.write() == [short, cut]
    assert short.prompt == "the patch"
    assert cut.text, "a prompt that fills the model leaves room for a token"
    with patch_disabled(base):
        assert given.write()[0].text != short.text
