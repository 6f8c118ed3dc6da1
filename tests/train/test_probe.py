"""Held-out losses against a plain forward pass of the base with labels, and that measuring leaves no trace."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy import Toy, make_base, make_it_look_trained

from revpatch.config import ProbeSetConfig, SidecarConfig
from revpatch.evaluation.probe import Prober
from revpatch.patch.patched_model import Patch, attach, patch_disabled, recording, switchboard
from revpatch.patch.sidecar import SidecarOutput
from revpatch.shards.format import Manifest, ShardWriter
from revpatch.shards.shard_set import ShardSet


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


def test_how_many_blocks_go_through_at_once_changes_nothing(world: World) -> None:
    few, many = (world.prober(rows, first=10).measure()["first"] for rows in (3, 64))
    np.testing.assert_allclose(few.losses, many.losses, rtol=1e-5)
    assert few.gates == pytest.approx(many.gates, rel=1e-5)
    assert few.changes == pytest.approx(many.changes, rel=1e-5)


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


@pytest.mark.parametrize("wanted", [1, 2, 5, 37])
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


def test_a_set_is_held_as_it_is_stored_and_never_whole_as_int64(toy: Toy, tmp_path: Path) -> None:
    blocks, size = 4096, 128
    tokens = np.random.default_rng(0).integers(0, 2**16 - 1, (blocks, size))
    (tmp_path / "many").mkdir()
    writer = ShardWriter(tmp_path / "many", "uint16", blocks)
    writer.write(tokens)
    counts = {"block_size": size, "blocks": blocks, "tokens": tokens.size, "dropped_tokens": 0}
    known = vars(Manifest.read(toy.shards("first"))) | {**counts, "shards": writer.close()}
    Manifest(**known).write(tmp_path / "many")
    with ShardSet(tmp_path / "many") as shards:
        shards.verify()
        tracemalloc.start()
        config = ProbeSetConfig(name="many", shards=str(tmp_path / "many"))
        prober = Prober(nn.Identity(), [(config, shards)], rows=8)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert np.array_equal(prober.blocks["many"], tokens)
    assert peak < 2 * 2 * blocks * size, "the set in 2 bytes a token, and a little"


@pytest.mark.parametrize("wanted", [None, 10**6])
def test_all_of_a_set_is_all_of_it(world: World, wanted: int | None) -> None:
    assert np.array_equal(world.prober(first=wanted).blocks["first"], world.tokens("first").numpy())


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
