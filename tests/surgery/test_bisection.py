"""Bisection over real commits of a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from made_up import MadeUp, patch_tensors, plus, taught
from toy import Toy

from revpatch.surgery.bisect import BASE, Evaluation, bisect

Make = Callable[..., MadeUp]


@pytest.mark.parametrize(("culprit", "layer"), [(37, 1), (1, 0), (64, 1)])
def test_one_of_64_commits_and_its_layer_are_found_in_8_evaluations(
    toy: Toy, make_run: Make, culprit: int, layer: int
) -> None:
    quiet = patch_tensors(strength=0)
    states = [quiet]
    harm = taught(toy, "base", worse=True, layer=layer, start=quiet)
    for number in range(1, 65):
        states.append(plus(harm if number >= culprit else quiet, 1e-3, seed=number))
    run = make_run(config=False)
    run.commits(states)
    told: list[Evaluation] = []
    found = bisect(run.directory, str(toy.shards("base_probe")), report=told.append)
    assert found.commit == f"{culprit - 1:03d}_p{culprit - 1}_commit.safetensors"
    assert found.evaluations_to_commit <= 8
    assert found.layers == [layer]
    assert told == found.evaluations
    assert [e.number for e in told] == list(range(1, len(told) + 1))
    assert found.loss is not None and found.loss_before is not None and found.above is not None
    assert found.loss_before < found.above < found.loss


def test_a_limit_can_be_given_and_nothing_may_be_found(toy: Toy, make_run: Make) -> None:
    quiet = patch_tensors(strength=0)
    run, shards = make_run(config=False), str(toy.shards("base_probe"))
    run.phase("one", quiet, taught(toy, "base", worse=True, layer=0))
    run.phase("two", quiet, taught(toy, "base", worse=True))
    base = bisect(run.directory, shards, above=1.0)
    assert base.commit is None and "start.safetensors is above the limit already" in base.note
    assert [e.above for e in base.evaluations] == [True, True]
    high = bisect(run.directory / "ledger", shards, above=100.0)
    assert high.commit is None and "the newest commit is not above" in high.note
    good = make_run("good", config=False)
    good.phase("one", quiet, taught(toy, "base"))
    found = bisect(good.directory, shards)
    assert found.commit is None and "not measurably worse" in found.note


def test_a_newest_loss_that_is_no_number_is_worse(toy: Toy, make_run: Make, revpatch: Callable[..., Any]) -> None:
    quiet = patch_tensors(strength=0)
    broken = {**quiet, "01.coupling.g.up.bias": quiet["01.coupling.g.up.bias"] + float("nan")}
    run = make_run(config=False)
    run.commits([quiet, plus(quiet, 1e-3, seed=1), broken, broken])
    found = bisect(run.directory, str(toy.shards("base_probe")))
    assert (found.commit, found.layers, found.note) == ("001_p1_commit.safetensors", [1], "")
    shown = revpatch("ledger", "bisect", run.directory, "--shards", toy.shards("base_probe"))
    assert "001_p1_commit.safetensors is the first commit found above every finite loss" in shown.out


def test_without_a_start_entry_it_begins_at_the_base(toy: Toy, make_run: Make) -> None:
    run = make_run(config=False)
    run.ledger.record("commit", 0, "one", 1, taught(toy, "base", worse=True), run.metadata)
    found = bisect(run.directory, str(toy.shards("base_probe")))
    assert found.before == BASE
    assert found.commit == "000_one_commit.safetensors"


def test_the_command_tells_each_evaluation_and_ends_with_json(
    toy: Toy, make_run: Make, revpatch: Callable[..., Any]
) -> None:
    run = make_run(config=False)
    run.phase("one", patch_tensors(strength=0), taught(toy, "base", worse=True, layer=1))
    result = revpatch("ledger", "bisect", run.directory, "--shards", toy.shards("base_probe"), "--json")
    found = json.loads(result.out)
    assert found["commit"] == "000_one_commit.safetensors"
    assert found["layers"] == [1]
    assert len(result.err.strip().splitlines()) == len(found["evaluations"])
    shown = revpatch("ledger", "bisect", run.directory, "--shards", toy.shards("base_probe"))
    assert shown.code == 0 and "000_one_commit.safetensors is the first commit found above" in shown.out
    empty = make_run("empty", config=False)
    empty.ledger.record("start", 0, "one", 0, patch_tensors(), run.metadata)
    refused = revpatch("ledger", "bisect", empty.directory, "--shards", toy.shards("base_probe"))
    assert (refused.code, refused.out) == (2, "") and "has no commit yet" in refused.err
