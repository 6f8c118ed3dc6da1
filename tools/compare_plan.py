"""Which cells a comparison needs, what matters most first: rates are swept on seed 0, and the best run on every seed.

What is needed next depends on what is done: a sweep whose best rate is at its edge is widened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compare_cells import Cell, Result, variant_of
from compare_curves import curve_of, curves_of, end_of, most_learned, rise_at
from compare_tiers import OWN, RATES, Tier

OURS, RIVAL = "ours", "lora+replay+kl"
FIRST = (OURS, RIVAL)
SHORT = ("lora", "full", "ours[replay=none]", "ours[replay=old]", "lora+replay", "full+replay+kl", "full+replay")
WHOLE = ("lora+replay+kl[joint=yes]", "ours[joint=yes]", "ours[sidecar.gate=token]")
START = (-1, 0, 1, 2)
"""Powers of two, times the family's first rate."""
WIDEST = 5
"""A sweep goes no further than so many doublings."""
Find = Callable[[Cell], Result | None]


def rate(family: str, doublings: int) -> float:
    """A rate of a family's sweep."""
    return float(f"{RATES[family] * 2.0**doublings:.4g}")


def groups(tier: Tier, short: bool, also: Sequence[str]) -> list[list[str]]:
    """The methods, those that matter most first."""
    extra = [family + how for how in ("+replay+kl", "") for family in tier.extra]
    every = [[*FIRST], [*also], [*SHORT], [] if short else [*WHOLE, *extra]]
    return [[one for one in group if tier.old_replay or "replay=old" not in one] for group in every]


def sweep(tier: Tier, variant: str, find: Find) -> tuple[list[Cell], list[Cell]]:
    """The cells of a method's sweep on the first seed, and its best: that which learns most and that which forgets
    least at equal learning. The best are empty until the sweep is done."""
    method, knobs = variant_of(variant)

    def cell(doublings: int) -> Cell:
        return Cell(method, rate(method.partition("+")[0], doublings), tier.seeds[0], knobs)

    wanted = list(START)
    while True:
        cells = [cell(doublings) for doublings in wanted]
        found = [find(one) for one in cells]
        results = [result for result in found if result is not None]
        if len(results) < len(cells):
            return cells, []
        best = {_best_at_learning(tier, results), _best_at_keeping(tier, results)}
        if 0 in best and wanted[0] > -WIDEST:
            wanted.insert(0, wanted[0] - 1)
        elif len(wanted) - 1 in best and wanted[-1] < WIDEST:
            wanted.append(wanted[-1] + 1)
        else:
            return cells, [cells[number] for number in sorted(best)]


def plan(tier: Tier, find: Find, short: bool, also: Sequence[str] = ()) -> list[Cell]:
    """Every cell that is needed as far as can be said now, in the order in which they are run; `also`: methods beside
    the usual ones."""
    cells: list[Cell] = []
    for group in groups(tier, short, also):
        best: list[Cell] = []
        for variant in group:
            swept, bests = sweep(tier, variant, find)
            cells += swept
            best += bests
        cells += [Cell(one.method, one.lr, seed, one.knobs) for seed in tier.seeds[1:] for one in best]
    return cells


def _best_at_learning(tier: Tier, results: Sequence[Result]) -> int:
    """The number of the cell whose corpora have the lowest losses in the end."""
    return min(
        range(len(results)),
        key=lambda number: (
            float("inf") if results[number]["diverged"] else sum(end_of(results[number])[name] for name in tier.corpora)
        ),
    )


def _best_at_keeping(tier: Tier, results: Sequence[Result]) -> int:
    """The number of the cell that forgets least of the base's own text where it has learned 90 % of the most that any
    of them learned in the first phase."""
    corpora, whole = list(tier.corpora), [result for result in results if not result["diverged"]]
    if not whole:
        return _best_at_learning(tier, results)
    level = 0.9 * most_learned(curves_of(whole, corpora, OWN))

    def rise(number: int) -> float:
        if results[number]["diverged"]:
            return float("inf")
        found = rise_at([curve_of(results[number], corpora, OWN)], level)
        return float("inf") if found is None else found

    return min(range(len(results)), key=rise)
