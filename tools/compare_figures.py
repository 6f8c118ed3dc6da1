"""The figures of a comparison, from the cells that are done."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from compare_cells import Result, cell_of
from compare_curves import (
    Spread,
    auc,
    curves_of,
    end_of,
    learned_within,
    most_learned,
    phases_of,
    rise_at,
)
from compare_plan import OURS, RIVAL
from compare_tiers import OWN, Tier
from figures import Figure

By = dict[str, dict[int, list[Result]]]
"""Results by variant and seed."""


def grouped(results: Sequence[Result]) -> By:
    """By variant and seed, variants in the order in which they are given."""
    found: By = defaultdict(lambda: defaultdict(list))
    for result in results:
        found[cell_of(result).variant][result["key"]["seed"]].append(result)
    return found


def best_rates(tier: Tier, by_seed: dict[int, list[Result]]) -> tuple[float, list[Result]]:
    """The rate with the lowest final losses of the corpora over the seeds that have it, and its results. Of rates that
    fewer seeds have, none is taken."""
    rates: dict[float, list[Result]] = defaultdict(list)
    for results in by_seed.values():
        for result in results:
            if not result["diverged"]:
                rates[result["key"]["lr"]].append(result)
    most = max(map(len, rates.values()), default=0)
    whole = {lr: results for lr, results in rates.items() if len(results) == most}
    if not whole:
        return 0.0, []
    lr = min(whole, key=lambda lr: statistics.mean(_mean_loss(tier, result) for result in whole[lr]))
    return lr, whole[lr]


def _mean_loss(tier: Tier, result: Result) -> float:
    losses = end_of(result)
    return statistics.mean(losses[name] for name in tier.corpora)


def overview(tier: Tier, by: By) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of methods: at each one's best rate, what every held-out set's loss did, from the
    unpatched base's to the end's."""
    sets = list(tier.held_out)
    columns = ["method", "lr", "seeds", *sets, "s/step", "trained", "MB", "MFLOP/new token"]
    rows = []
    for variant, by_seed in by.items():
        lr, results = best_rates(tier, by_seed)
        if not results:
            rows.append([variant, "", "", *["diverged"] * len(sets), "", "", "", ""])
            continue
        changes = [
            str(Spread.of([end_of(result)[name] - result["checks"][0]["losses"][name] for result in results]))
            for name in sets
        ]
        one = results[0]
        rows.append(
            [
                variant,
                f"{lr:g}",
                str(len(results)),
                *changes,
                f"{statistics.median(result['seconds_a_step'] for result in results):.3f}",
                f"{one['trainable']:,}",
                f"{one['bytes'] / 1e6:.3f}",
                f"{one['flops_a_new_token'] / 1e6:.1f}",
            ]
        )
    return columns, rows


def figures_of(tier: Tier, results: Sequence[Result]) -> list[Figure]:
    """All that was asked, measured or not, and what explains it."""
    by = grouped(results)
    rows: list[Figure] = [*_against_the_rival(tier, by), *_against_plain(tier, by), *_gates(tier, by)]
    if tier.name != "real":
        rows += _own_against_old(tier, by)
    rows += _matrix(tier, by)
    return rows


def equal_learning(
    tier: Tier, by: By, one: str, other: str, old: str, phase: int
) -> tuple[list[float], list[float], float | None]:
    """The rises of an old set under two methods at the most that both have learned in a phase, seed by seed; and the
    mean of that learning."""
    ours, theirs, levels = [], [], []
    for seed in sorted(by.get(one, {}).keys() & by.get(other, {}).keys()):
        a, b = (
            curves_of(_of_phase(by[variant][seed], phase), list(tier.corpora), old, phase) for variant in (one, other)
        )
        if not a or not b:
            continue
        level = min(most_learned(a), most_learned(b))
        rise_a, rise_b = rise_at(a, level), rise_at(b, level)
        if rise_a is not None and rise_b is not None:
            ours.append(rise_a)
            theirs.append(rise_b)
            levels.append(level)
    return ours, theirs, statistics.mean(levels) if levels else None


def _of_phase(results: Sequence[Result], phase: int) -> list[Result]:
    return [result for result in results if not result["diverged"] and phase < phases_of(result)]


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Rise over rise, of the means; None where the other doesn't rise, so that there is nothing to compare."""
    if not ours or statistics.mean(theirs) <= 0:
        return None
    return statistics.mean(ours) / statistics.mean(theirs)


def _phases(tier: Tier) -> list[tuple[int, str]]:
    return list(enumerate(tier.corpora))


def _against_the_rival(tier: Tier, by: By) -> list[Figure]:
    limit = 0.2 if tier.name == "real" else 0.3
    rows = []
    for phase, corpus in _phases(tier):
        ours, theirs, level = equal_learning(tier, by, OURS, RIVAL, OWN, phase)
        name = f"own text's rise at equal learning, {OURS} / {RIVAL}, after {corpus}"
        rows.append(Figure.at_most(name, limit, _ratio(ours, theirs), "times"))
        if level is not None:
            rows.append(Figure.plain(f"learned by both, after {corpus}", level, "nats/token"))
            for variant, values in ((OURS, ours), (RIVAL, theirs)):
                said = str(Spread.of(values))
                rows.append(Figure.plain(f"own text's rise there, {variant}, after {corpus}", said, "nats/token"))
        others, falling = [], [OWN] if level is not None and statistics.mean(theirs) <= 0 else []
        for old in tier.old:
            ours, theirs, _ = equal_learning(tier, by, OURS, RIVAL, old, phase)
            ratio = _ratio(ours, theirs)
            if ratio is not None:
                others.append(ratio)
            elif ours:
                falling.append(old)
        name = f"the same, mean over old sets that are not replayed and rise under {RIVAL}, after {corpus}"
        rows.append(Figure.at_most(name, 0.5, statistics.mean(others) if others else None, "times"))
        if falling:
            name = f"old sets that fall under {RIVAL}, not counted as forgotten, after {corpus}"
            rows.append(Figure.plain(name, ", ".join(falling), ""))
        name = f"learned at no more forgetting of own text, {OURS} / best {RIVAL}, after {corpus}"
        rows.append(Figure.at_least(name, 1.0, _learned_ratio(tier, by, phase), "times"))
    return rows


def _learned_ratio(tier: Tier, by: By, phase: int) -> float | None:
    ratios = []
    for seed in sorted(by.get(OURS, {}).keys() & by.get(RIVAL, {}).keys()):
        a, b = (
            curves_of(_of_phase(by[variant][seed], phase), list(tier.corpora), OWN, phase) for variant in (OURS, RIVAL)
        )
        if a and b:
            learned, rise = max(point for curve in b for point in curve)
            ratios.append(learned_within(a, rise) / learned)
    return statistics.mean(ratios) if ratios else None


def _against_plain(tier: Tier, by: By) -> list[Figure]:
    rows = []
    last, corpus = _phases(tier)[-1]
    for other in ("lora", "full"):
        for old in (OWN, *tier.old):
            ours, theirs, _ = equal_learning(tier, by, OURS, other, old, last)
            rows.append(
                Figure.at_most(
                    f"{old}'s rise at equal learning, {OURS} / {other} without replay, after {corpus}",
                    0.1,
                    _ratio(ours, theirs),
                    "times",
                )
            )
    return rows


def _gates(tier: Tier, by: By) -> list[Figure]:
    _, results = best_rates(tier, by.get(OURS, {}))
    rows = []
    for phase, corpus in _phases(tier):
        for old, asked in ((OWN, 0.98), *((old, 0.8) for old in tier.old)):
            values = [
                auc(result["block_gates"][phase][corpus], result["block_gates"][phase][old]) for result in results
            ]
            name = f"gate's AUC, {corpus} against {old}"
            rows.append(Figure.at_least(name, asked, statistics.mean(values) if values else None, ""))
    return rows


def _own_against_old(tier: Tier, by: By) -> list[Figure]:
    rows = []
    for phase, corpus in _phases(tier):
        for other, limit in (("ours[replay=old]", 1.5), ("ours[replay=none]", 1 / 3)):
            for old in tier.old:
                ours, theirs, _ = equal_learning(tier, by, OURS, other, old, phase)
                rows.append(
                    Figure.at_most(
                        f"{old}'s rise at equal learning, {OURS} / {other}, after {corpus}",
                        limit,
                        _ratio(ours, theirs),
                        "times",
                    )
                )
    return rows


def _matrix(tier: Tier, by: By) -> list[Figure]:
    """R[i, j], and what follows from it, of each method at its best rate."""
    rows = []
    corpora = list(tier.corpora)
    for variant, by_seed in by.items():
        lr, results = best_rates(tier, by_seed)
        results = [result for result in results if phases_of(result) == len(corpora)]
        if not results:
            continue
        rows.append(Figure.plain(f"best rate, {variant}, of {len(results)} seeds", lr, ""))
        for after in range(-1, len(corpora)):
            stage = "the unpatched base" if after < 0 else f"after {corpora[after]}"
            for name in tier.held_out:
                values = [_loss(result, after, name) for result in results]
                rows.append(Figure.plain(f"loss of {name}, {variant}, {stage}", statistics.mean(values), "nats/token"))
        one = results[0]
        rows += [
            Figure.plain(f"bytes of a commit, {variant}", one["bytes"], "bytes"),
            Figure.plain(f"a step, {variant}", statistics.median(r["seconds_a_step"] for r in results), "s"),
            Figure.plain(f"operations a new token, {variant}", one["flops_a_new_token"], "FLOP"),
        ]
        if len(corpora) > 1:
            backward = [
                statistics.mean(
                    _loss(result, number, name) - _loss(result, len(corpora) - 1, name)
                    for number, name in enumerate(corpora[:-1])
                )
                for result in results
            ]
            forward = [
                statistics.mean(
                    _loss(result, -1, name) - _loss(result, number - 1, name)
                    for number, name in enumerate(corpora)
                    if number
                )
                for result in results
            ]
            for number, name in enumerate(corpora[:-1]):
                since = [_loss(result, len(corpora) - 1, name) - _loss(result, number, name) for result in results]
                rows.append(
                    Figure.plain(f"rise of {name} since it was learned, {variant}", str(Spread.of(since)), "nats/token")
                )
            rows.append(Figure.plain(f"BWT, {variant} (above 0 is gained)", statistics.mean(backward), "nats/token"))
            rows.append(Figure.plain(f"FWT, {variant} (above 0 is gained)", statistics.mean(forward), "nats/token"))
    return rows


def _loss(result: Result, after: int, name: str) -> float:
    losses = result["checks"][0]["losses"] if after < 0 else end_of(result, after)
    return float(losses[name])
