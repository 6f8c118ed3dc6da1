"""The searches on made-up losses: what they find, and how few questions they ask."""

from __future__ import annotations

import itertools
import math

import pytest

from revpatch.surgery.bisect import fewest_to_blame, first_above


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


def test_what_goes_up_and_down_still_gives_a_step_from_fine_to_worse() -> None:
    losses = [1.0, 5.0, 1.0, 1.0, 6.0, 2.0, 7.0, 7.0]
    found = first_above(losses.__getitem__, len(losses), 3.0)
    assert found is not None
    assert losses[found.worse] > 3.0 >= losses[found.worse - 1]


@pytest.mark.parametrize(
    ("losses", "above"), [([1.0, 9.0, 2.0], 2.0), ([4.0, 9.0], 3.0), ([math.nan, 9.0], 3.0), ([3.0, 2.0], None)]
)
def test_there_is_nothing_to_find_unless_it_went_from_below_to_above(losses: list[float], above: float | None) -> None:
    assert first_above(losses.__getitem__, len(losses), above) is None


def test_a_loss_that_is_not_a_number_is_above() -> None:
    found = first_above([1.0, 1.0, math.nan, math.nan].__getitem__, 4, 2.0)
    assert found is not None and found.worse == 2


def test_every_group_to_blame_is_found() -> None:
    """Each culprit adds 1; the limit leaves room for none."""
    for layers, count in ((1, 1), (2, 2), (12, 1), (12, 2), (12, 3)):
        for culprits in itertools.combinations(range(layers), count):
            asked: list[frozenset[int]] = []

            def loss(
                without: frozenset[int], culprits: tuple[int, ...] = culprits, asked: list[frozenset[int]] = asked
            ) -> float:
                asked.append(without)
                return 3.0 + sum(c not in without for c in culprits)

            assert fewest_to_blame(loss, range(layers), 3.5) == list(culprits)
            assert len(asked) == len(set(asked)) <= count * (2 + math.ceil(math.log2(layers)))


def test_no_more_are_blamed_than_the_limit_needs() -> None:
    """Any two of these four suffice."""
    found = fewest_to_blame(lambda without: 4.0 - len(without & {1, 3, 5, 7}), range(9), 2.0)
    assert found is not None and len(found) == 2 and set(found) <= {1, 3, 5, 7}


def test_what_was_found_first_is_left_out_if_it_is_needless_beside_the_rest() -> None:
    """Part 1 does the harm; to take out part 0 as well does some, unless part 2 is out too."""

    def loss(without: frozenset[int]) -> float:
        return 4.0 - (1 in without) + (0 in without and 2 not in without)

    assert fewest_to_blame(loss, range(3), 3.0) == [1]


def test_none_is_to_blame_if_all_together_are_not_enough() -> None:
    assert fewest_to_blame(lambda without: 4.0 - 0.1 * len(without), range(4), 3.0) is None
