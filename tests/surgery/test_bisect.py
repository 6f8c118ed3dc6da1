"""Bisection: what it finds, in how few questions, on made-up losses and over real commits of a tiny model."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from made_up import MadeUp, patch_tensors, plus, taught
from toy import Toy

from revpatch.surgery.bisect import BASE, Evaluation, bisect, fewest_to_blame, first_above

Make = Callable[..., MadeUp]


def test_the_first_worse_state_is_found_in_two_and_log2_questions() -> None:
    for states in (2, 3, 17, 65):
        for culprit in range(1, states):
            asked: list[int] = []

            def loss(index: int, culprit: int = culprit, asked: list[int] = asked) -> float:
                asked.append(index)
                return 3.0 + 0.001 * index + (1.0 if index >= culprit else 0.0)

            found = first_above(loss, states, None)
            assert found is not None and found.worse == culprit
            assert len(asked) == len(set(asked)) <= 2 + math.ceil(math.log2(states - 1))


@pytest.mark.parametrize(
    ("losses", "above", "worse"),
    [
        ([1.0, 5.0, 1.0, 1.0, 6.0, 2.0, 7.0, 7.0], 3.0, {1, 4, 6}),  # up and down: one of the steps
        ([1.0, 1.0, math.nan, math.nan], 2.0, {2}),
        ([1.0, 9.0, 2.0], 2.0, {None}),
        ([math.nan, 9.0], 3.0, {None}),
        ([3.0, 2.0], None, {None}),
    ],
)
def test_what_is_found_is_a_step_from_fine_to_worse(losses: list[float], above: float | None, worse: set[Any]) -> None:
    found = first_above(losses.__getitem__, len(losses), above)
    assert (None if found is None else found.worse) in worse


def test_every_group_to_blame_is_found_and_none_that_is_needless() -> None:
    """Each culprit adds 1; the limit leaves room for none."""
    for layers, count in ((1, 1), (2, 2), (12, 2), (12, 3)):
        for culprits in itertools.combinations(range(layers), count):
            asked: list[frozenset[int]] = []

            def loss(
                without: frozenset[int], culprits: tuple[int, ...] = culprits, asked: list[frozenset[int]] = asked
            ) -> float:
                asked.append(without)
                return 3.0 + sum(c not in without for c in culprits)

            assert fewest_to_blame(loss, range(layers), 3.5) == list(culprits)
            assert len(asked) == len(set(asked)) <= count * (2 + math.ceil(math.log2(layers)))
    found = fewest_to_blame(lambda without: 4.0 - len(without & {1, 3, 5, 7}), range(9), 2.0)
    assert found is not None and len(found) == 2 and set(found) <= {1, 3, 5, 7}, "any two of these four suffice"
    # Part 1 does the harm; to take out part 0 as well does some, unless part 2 is out too.
    assert fewest_to_blame(lambda w: 4.0 - (1 in w) + (0 in w and 2 not in w), range(3), 3.0) == [1]
    assert fewest_to_blame(lambda without: 4.0 - 0.1 * len(without), range(4), 3.0) is None


def test_one_of_64_commits_and_its_layer_are_found_in_8_evaluations(toy: Toy, make_run: Make) -> None:
    quiet = patch_tensors(strength=0)
    harm = taught(toy, "base", worse=True, layer=1, start=quiet)
    run = make_run(config=False)
    run.commits([quiet, *(plus(harm if n >= 37 else quiet, 1e-3, seed=n) for n in range(1, 65))])
    reported: list[Evaluation] = []
    found = bisect(run.directory, str(toy.shards("base_probe")), report=reported.append)
    assert found.commit == "036_p36_commit.safetensors" and found.layers == [1]
    assert found.evaluations_to_commit <= 8
    assert reported == found.evaluations
    assert [e.number for e in reported] == list(range(1, len(reported) + 1))
    assert found.loss is not None and found.loss_before is not None and found.above is not None
    assert found.loss_before < found.above < found.loss


def test_a_limit_can_be_given_and_nothing_may_be_found(toy: Toy, make_run: Make) -> None:
    quiet, shards = patch_tensors(strength=0), str(toy.shards("base_probe"))
    run, good = make_run(config=False), make_run("good", config=False)
    run.phase("one", quiet, taught(toy, "base", worse=True, layer=0))
    good.phase("one", quiet, taught(toy, "base"))
    for folder, above, words in (
        (run.directory, 1.0, "start.safetensors is above the limit already"),
        (run.directory / "ledger", 100.0, "the newest commit is not above"),
        (good.directory, None, "not measurably worse"),
    ):
        found = bisect(folder, shards, above=above)
        assert found.commit is None and words in found.note


def test_a_newest_loss_that_is_no_number_is_worse(toy: Toy, make_run: Make) -> None:
    quiet = patch_tensors(strength=0)
    broken = {**quiet, "01.coupling.g.up.bias": quiet["01.coupling.g.up.bias"] + float("nan")}
    run = make_run(config=False)
    run.commits([quiet, plus(quiet, 1e-3, seed=1), broken])
    found = bisect(run.directory, str(toy.shards("base_probe")))
    assert (found.commit, found.layers, found.note) == ("001_p1_commit.safetensors", [1], "")


def test_the_command_reports_each_evaluation_and_ends_with_json(
    toy: Toy, make_run: Make, revpatch: Callable[..., Any]
) -> None:
    run, shards = make_run(config=False), ["--shards", toy.shards("base_probe")]
    run.ledger.record("commit", 0, "one", 1, taught(toy, "base", worse=True, layer=1), run.metadata)
    result = revpatch("ledger", "bisect", run.directory, *shards, "--json")
    found = json.loads(result.out)
    assert (found["commit"], found["before"], found["layers"]) == ("000_one_commit.safetensors", BASE, [1])
    assert len(result.err.strip().splitlines()) == len(found["evaluations"])
    shown = revpatch("ledger", "bisect", run.directory, *shards)
    assert shown.code == 0 and "000_one_commit.safetensors is the first commit found above" in shown.out
    empty = make_run("empty", config=False)
    empty.ledger.record("start", 0, "one", 0, patch_tensors(), run.metadata)
    refused = revpatch("ledger", "bisect", empty.directory, *shards)
    assert (refused.code, refused.out) == (2, "") and "has no commit yet" in refused.err
