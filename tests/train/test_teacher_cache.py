"""The teacher's cache: exact, within its budget, gone when the teacher changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import Runs, RunServer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from toy import BLOCK_SIZE, WIDTH, Toy
from transformers import GPT2Config, GPT2LMHeadModel

from revpatch.config import SidecarConfig
from revpatch.patch.patched_model import attach, switchboard
from revpatch.shards.mixture import hash64
from revpatch.shards.replay import ReplayMixture
from revpatch.shards.shard_set import ShardSet
from revpatch.step.teacher import Teacher, TeacherCache

TOKENS = torch.arange(6 * 8).view(6, 8) % 50
KEYS = [("a set", number) for number in range(6)]
STATES = 8 * 32 * 4
"""Bytes of one block's states."""


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16)).eval()


@pytest.fixture
def teacher(base: nn.Module) -> Teacher:
    patch = attach(base, SidecarConfig(bottleneck=4))
    for parameter in patch.parameters():
        nn.init.normal_(parameter, std=0.3)
    teacher = Teacher(base, TeacherCache(10**6))
    teacher.follow(patch)
    for parameter in patch.parameters():
        nn.init.normal_(parameter, std=0.3)
    return teacher


def cache_of(teacher: Teacher) -> TeacherCache:
    assert teacher.cache is not None
    return teacher.cache


@pytest.mark.parametrize("stats", [False, True])
def test_what_is_kept_is_what_would_be_computed_whatever_it_was_asked_with(teacher: Teacher, stats: bool) -> None:
    first = teacher.hidden(TOKENS[:4], stats, KEYS[:4])
    assert cache_of(teacher).take_rate() == 0
    again = teacher.hidden(TOKENS[[5, 2, 0]], stats, [KEYS[5], KEYS[2], KEYS[0]])
    assert cache_of(teacher).take_rate() == pytest.approx(2 / 3)
    assert torch.equal(again.hidden[1:], first.hidden[[2, 0]])
    teacher.forget()
    alone = teacher.hidden(TOKENS[[2, 0]], stats, [KEYS[2], KEYS[0]])
    assert torch.equal(alone.hidden, again.hidden[1:])
    plain = teacher.hidden(TOKENS[[2, 0]], stats)
    torch.testing.assert_close(plain.hidden, alone.hidden)
    assert len(plain.stats) == len(alone.stats) == (2 if stats else 0)
    for one, other in zip(plain.stats, alone.stats, strict=True):
        torch.testing.assert_close(one, other)
        assert one.shape == (2, 2, 32)


@pytest.mark.parametrize("budget", [None, STATES, 10**6], ids=["no cache", "room for one", "room for all"])
def test_the_base_answers_for_what_it_knew_and_the_commit_for_the_rest(
    base: nn.Module, teacher: Teacher, budget: int | None
) -> None:
    cache = None if budget is None else TeacherCache(budget)
    both = Teacher(base, cache, base_set="old")
    both.patch = teacher.patch
    keys = [("old" if number % 2 else "learned", number) for number in range(6)]
    said = both.hidden(TOKENS, keep_stats=True, keys=keys)
    committed, untaught = Teacher(base), Teacher(base)
    committed.patch = teacher.patch
    for rows, expected in (([0, 2, 4], committed), ([1, 3, 5], untaught)):
        alone = expected.hidden(TOKENS[rows], keep_stats=True)
        torch.testing.assert_close(said.hidden[rows], alone.hidden)
        for one, other in zip(said.stats, alone.stats, strict=True):
            torch.testing.assert_close(one[:, rows], other)
    assert not torch.allclose(said.hidden[1], committed.hidden(TOKENS[1:2]).hidden[0])


@pytest.mark.parametrize(("budget", "kept"), [(3 * STATES, 3), (0, 0)])
def test_no_more_is_kept_than_the_budget_allows(base: nn.Module, teacher: Teacher, budget: int, kept: int) -> None:
    teacher.cache = cache = TeacherCache(budget)
    first = teacher.hidden(TOKENS, keys=KEYS).hidden
    assert len(cache) == kept
    cache.take_rate()
    assert torch.equal(teacher.hidden(TOKENS, keys=KEYS).hidden, first)
    assert cache.take_rate() == pytest.approx(kept / 6)
    teacher.follow(switchboard(base).attached)
    assert len(cache) == 0, "a new teacher begins with nothing"
    assert cache.take_rate() is None
    assert not torch.equal(teacher.hidden(TOKENS, keys=KEYS).hidden, first)


def test_what_is_let_in_is_small_sets_first_then_a_share_and_never_depends_on_what_was_drawn() -> None:
    sets, size = {"base": 4000, "first": 100, "second": 200}, 10
    cache = TeacherCache(1100 * size)
    cache.expect(sets)
    let_in = {name: [cache.admits((name, block), size) for block in range(blocks)] for name, blocks in sets.items()}
    assert all(let_in["first"]) and all(let_in["second"])
    assert sum(let_in["base"]) == pytest.approx(800, rel=0.1), "what room the small sets leave"
    assert 0.5 < sum(let_in["base"][:2000]) / sum(let_in["base"][2000:]) < 2, "from all over the set"
    cache.put(("base", 0), [torch.zeros(1100 * size // 4)])
    fresh = TeacherCache(1100 * size)
    fresh.expect(dict(reversed(sets.items())))
    for other in (cache, fresh):
        assert [other.admits(("base", block), size) for block in range(4000)] == let_in["base"]
    cache.expect({**sets, "third": 1000})
    assert sum(cache.admits(("base", block), size) for block in range(4000)) == 0
    assert sum(cache.admits(("third", block), size) for block in range(1000)) == pytest.approx(800, rel=0.1)


def test_a_run_that_goes_on_with_an_empty_cache_hears_the_same_bits(teacher: Teacher) -> None:
    cache = cache_of(teacher)
    cache.budget = 3 * STATES
    cache.expect({"a set": 6})
    rows = []
    run = teacher._run
    teacher._run = lambda tokens, stats, patch: rows.append(len(tokens)) or run(tokens, stats, patch)  # type: ignore[method-assign]
    kept = sum(cache.admits(key, STATES) for key in KEYS)
    assert 0 < kept < 6
    first = teacher.hidden(TOKENS, keys=KEYS).hidden
    assert sorted(rows) == [1] * kept + [6 - kept], "what is kept by itself, the others together"
    assert cache.take_rate() == 0
    again = teacher.hidden(TOKENS, keys=KEYS).hidden
    assert cache.take_rate() == kept / 6
    teacher.forget()
    resumed = teacher.hidden(TOKENS, keys=KEYS).hidden
    assert torch.equal(first, again) and torch.equal(first, resumed)
    torch.testing.assert_close(first, run(TOKENS, False, teacher.patch).hidden)


def counted(shares: dict[Path, float], first_step: int, room: int) -> list[float]:
    """What of the replayed blocks is found again, by every four steps of a phase of 12, four blocks a step, if this
    share of each set is let in and there is room for so many blocks."""
    sets = [ShardSet(folder) for folder in shares]
    drawn, kept, found = ReplayMixture(sets, 4, seed=0), set(), []
    for step in range(first_step, first_step + 12):
        for which, block in zip(*map(list, drawn.locate(step)), strict=True):
            found.append((which, block) in kept)
            if len(kept) < room and int(hash64(block)) < list(shares.values())[which] * 2**64:
                kept.add((which, block))
    return [sum(found[start : start + 16]) / 16 for start in range(0, 48, 16)]


def test_a_run_tells_the_cache_what_it_will_replay(toy: Toy, server: RunServer, tmp_path: Path) -> None:
    """The phase's sample has room whole and the base's blocks in part; which these are is known from the sets alone."""
    room, base = 32, toy.shards("base_probe")
    probe = {"name": "first", "shards": str(toy.shards("first_probe")), "tolerance": 9.0, "max_blocks": 4}
    config = toy.config_file(
        tmp_path,
        replay={"base": str(base), "blocks_per_phase": 8},
        probes={"every": 4, "sets": [probe]},
        rollback={"max_drift": 9.0},
        teacher={"cache_gb": (room + 0.5) * BLOCK_SIZE * WIDTH * 4 / 1e9},
        monitoring={"tensorboard": True},
    )
    runs = Runs(server, config, tmp_path)
    assert runs.run("run", world=1) == [0], runs.log("run").read_text()
    events = EventAccumulator(str(runs.path("run") / "tensorboard")).Reload()
    rates = [point.value for point in events.Scalars("teacher/cache_hit_rate")]
    blocks, sample = len(ShardSet(base)), runs.path("run") / "replay/000_first"
    assert blocks > 2 * room and len(ShardSet(sample)) == 8
    second = counted({base: (room - 8) / blocks, sample: 1.0}, 12, room)
    assert rates == pytest.approx(counted({base: room / blocks}, 0, room) + second)
    assert 0 < rates[2] < second[-1]
