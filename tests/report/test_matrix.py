"""The matrix: textbook measures of hand-made numbers, and intervals that are those of paired blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from revpatch.evaluation.guard import mean_interval
from revpatch.report.history import Matrix

# Rows: base, a, b, c. Columns: old text, taught by none, then those that a, b and c teach.
R = np.array(
    [
        [-3.0, -6.0, -7.0, -8.0],
        [-3.1, -4.0, -6.5, -7.9],
        [-3.2, -4.3, -5.0, -7.6],
        [-3.05, -4.2, -5.4, -6.0],
    ]
)


def made_up(spread: float | None = None, rows: int = 4, blocks: int = 8) -> Matrix:
    """R, and blocks whose means it is; what makes a block hard is the same in every row but for `spread`."""
    noise = np.random.default_rng(0)
    hard = noise.normal(size=(R.shape[1], blocks))

    def losses(i: int, j: int) -> np.ndarray:
        found = hard[j] + spread * noise.normal(size=blocks)
        return found - found.mean() - R[i, j]

    of_blocks = [[None if spread is None else losses(i, j) for j in range(R.shape[1])] for i in range(rows)]
    names = ["base", "a", "b", "c"][:rows]
    return Matrix(names, ["old", "a", "b", "c"], [0, 1, 2, 3], R[:rows], of_blocks, 0.95)


def test_the_measures_are_those_of_the_literature() -> None:
    found = made_up().measures()
    values = {name: of.value for name, of in found.items() if of is not None}
    assert values == pytest.approx(
        {
            "average": (-4.2 - 5.4 - 6.0) / 3,
            "BWT": ((-4.2 + 4.0) + (-5.4 + 5.0)) / 2,
            "forgetting": ((-4.0 + 4.2) + (-5.0 + 5.4)) / 2,
            "FWT": ((-6.5 + 7.0) + (-7.6 + 8.0)) / 2,
            "base text since the base": -3.05 + 3.0,
        }
    )
    assert all(of is not None and of.low is None for of in found.values()), "without blocks there is no interval"


def test_a_run_that_is_not_over_is_measured_as_far_as_it_is() -> None:
    assert not any(made_up(rows=1).measures().values())
    two = made_up(rows=3).measures()
    found = [two[name].value for name in ("average", "BWT", "FWT")]
    assert found == pytest.approx([(-4.3 - 5.0) / 2, -0.3, 0.5])


def test_a_run_that_began_with_a_patch_is_held_to_the_base_for_what_the_base_knew() -> None:
    matrix = replace(
        made_up(spread=0.1), rows=["000_x_origin.safetensors", "a", "b", "c"], base=[-2.9, -9.0, -9.0, -9.0]
    )
    found = matrix.measures()["base text since the base"]
    assert (found.value, found.low) == (pytest.approx(-3.05 + 2.9), None)
    assert matrix.measures()["FWT"].value == pytest.approx(made_up().measures()["FWT"].value)


def test_the_interval_of_one_set_is_that_of_paired_blocks() -> None:
    matrix = made_up(spread=0.1)
    then, now = matrix.losses[0][1], matrix.losses[1][1]
    found = matrix.difference(1, 0, 1)
    assert (found.value, found.low, found.high) == pytest.approx(mean_interval(then - now, 0.95))
    assert found.high - found.low < 0.5, "what makes a block hard has cancelled"


def test_the_interval_of_a_mean_over_sets_covers_as_often_as_it_says() -> None:
    noise, hits, trials = np.random.default_rng(1), 0, 600
    for _ in range(trials):
        blocks = [noise.normal(1.0, 0.5, 12), noise.normal(2.0, 1.5, 6)]
        rows = [[np.zeros(12), np.zeros(6)], [-blocks[0], -blocks[1]]]
        values = np.array([[0.0, 0.0], [blocks[0].mean(), blocks[1].mean()]])
        found = Matrix(["base", "a"], ["x", "y"], [0, 0], values, rows, 0.9).measures()["base text since the base"]
        hits += found.low <= 1.5 <= found.high
    assert 0.87 <= hits / trials <= 0.94


def test_a_state_that_did_not_change_has_an_interval_of_no_width() -> None:
    same = np.array([1.0, 2.0, 3.0])
    found = Matrix(["base", "a"], ["x"], [0], np.array([[-2.0], [-2.0]]), [[same], [same]], 0.95).difference(1, 0, 0)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
