"""The rows of bench.py's table: what was asked for, beside what was measured, and what could not be."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from bench_workload import Workload, name_of
from figures import Figure, read_figures

ASKED = {
    "textbook-fp32": 5.0,
    "textbook-bf16": 2.2,
    "lora-kl": 2.0,
    "lora-lm": 1.3,
    "full-lm": 2.0,
}
"""How many times as long as ours a full step is to take; LoRA's with a bfloat16 base."""
FROZEN = ("ours", "lora")
"""How the names of those begin whose base is frozen, and so stored in the workload's type."""


@dataclass
class Found:
    """What was measured of each peer, by its name."""

    workload: Workload
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Round by round; under "rate" the machine's own rate in FLOP/s."""
    flops: dict[str, int] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, float] = field(default_factory=dict)
    """Relative gradient errors."""


def rows_of(found: Found) -> list[Figure]:
    """All rows that bench.py measures itself. Ratios are medians of the rounds' ratios."""
    rows = [row for name, limit in ASKED.items() for row in against(found, name, limit)]
    rows += loss_rows(found.seconds)
    share = None
    if {"ours", "textbook-fp32"} <= found.memory.keys():
        share = found.memory["ours"] / found.memory["textbook-fp32"]
    rows.append(Figure.at_most("peak memory of a step, ours / textbook-fp32", 0.2, share, "of it"))
    rows += rate_rows(found)
    rows += memory_rows(found.memory, found.workload)
    rows += [
        Figure.plain(f"step, {labelled(name, found.workload)}", statistics.median(values), "s")
        for name, values in found.seconds.items()
        if name != "rate"
    ]
    rows += [Figure.plain(f"operations of a step, {name}", value / 1e9, "GFLOP") for name, value in found.flops.items()]
    rows += [Figure.plain(f"relative gradient error, {name}", value, "") for name, value in found.wrong.items()]
    return rows


def against(found: Found, name: str, limit: float) -> list[Figure]:
    """A peer's rows. LoRA was asked for with a bfloat16 base: with another, the asked row is not measured."""
    asked = f"{name} / ours"
    as_asked = not name.startswith("lora") or found.workload.dtype == torch.bfloat16
    if name not in found.seconds:
        return [Figure.at_least(asked, limit, None, "times")]
    theirs, own = found.seconds[name], labelled(name, found.workload)
    rows = [] if as_asked else [Figure.at_least(asked, limit, None, "times")]
    for variant in ("ours", "ours-cached"):
        median = median_ratio(theirs, found.seconds[variant])
        if variant == "ours" and as_asked:
            rows.append(Figure.at_least(asked, limit, median, "times"))
        else:
            rows.append(Figure.plain(f"{own} / {variant}", median, "times"))
    rows.append(Figure.plain(f"{own} / ours, of the minima", min(theirs) / min(found.seconds["ours"]), "times"))
    floor = found.flops[name] / found.flops["ours"]
    return [*rows, Figure.plain(f"{own} / ours, by counted operations", floor, "times")]


def loss_rows(seconds: dict[str, list[float]]) -> list[Figure]:
    """The loss over the head alone."""
    ours = seconds["loss: ours"]
    ratio = median_ratio(seconds["loss: textbook"], ours)
    rows = [Figure.at_least("loss alone, textbook CE + KL / ours", 2.2, ratio, "times")]
    for name in seconds:
        if name.startswith("loss: ") and name not in ("loss: ours", "loss: textbook"):
            what = name.removeprefix("loss: ")
            rows.append(Figure.plain(f"loss alone, {what} / ours", median_ratio(seconds[name], ours), "times"))
    if "loss: ours, compiled" in seconds:
        ratio = median_ratio(seconds["loss: textbook"], seconds["loss: ours, compiled"])
        rows.append(Figure.plain("loss alone, textbook / ours, compiled", ratio, "times"))
    if "loss: Liger" not in seconds:
        rows.append(Figure.plain("loss alone, Liger / ours", "not installed here", "times"))
    return rows


def rate_rows(found: Found) -> list[Figure]:
    """How much of what this machine does at matrix products alone a step reaches."""
    share = statistics.median(
        found.flops["ours"] / step / rate
        for step, rate in zip(found.seconds["ours"], found.seconds["rate"], strict=True)
    )
    name, is_bf16 = name_of(found.workload.dtype), found.workload.dtype == torch.bfloat16
    rows = [Figure.at_least(share_name(torch.bfloat16), 0.75, share if is_bf16 else None, "of it")]
    if not is_bf16:
        rows.append(Figure.plain(share_name(found.workload.dtype), share, "of it"))
    rate = statistics.median(found.seconds["rate"]) / 1e9
    return [*rows, Figure.plain(f"{name} matrix-product rate", rate, "GFLOP/s")]


def share_name(dtype: torch.dtype) -> str:
    """The row's; tools/scale_model.py reads it."""
    return f"share of the {name_of(dtype)} matrix-product rate"


def memory_rows(memory: dict[str, float], workload: Workload) -> list[Figure]:
    """Each peer's, and ours against the textbook's."""
    rows = []
    if (textbook := memory.get("textbook-fp32")) is not None:
        rows = [
            Figure.plain(f"peak memory, {labelled(name, workload)} / textbook-fp32", value / textbook, "of it")
            for name, value in memory.items()
            if name.startswith("ours")
        ]
    return rows + [
        Figure.plain(f"peak memory, {labelled(name, workload)}", value / 2**20, "MiB") for name, value in memory.items()
    ]


def labelled(name: str, workload: Workload) -> str:
    """A peer's name, with the type of its base if that is frozen."""
    return f"{name} ({name_of(workload.dtype)} base)" if name.startswith(FROZEN) else name


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of each round's ratio."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def spread_cost(found: Found, budget: int, sets: Sequence[int], steps: int) -> Figure:
    """The mean step of a phase that begins with an empty cache, relative to one without a cache.

    Args:
        found: the times of "ours", "ours-cached" (all found) and "ours-filling" (none found).
        budget: bytes that the cache may keep.
        sets: blocks in each replay set; every set has the same share of the draws, which are uniform within it.
        steps: of the phase.
    """
    without, hit, filling = (statistics.median(found.seconds[name]) for name in ("ours", "ours-cached", "ours-filling"))
    workload = found.workload
    room = budget // (workload.block * workload.config().n_embd * workload.dtype.itemsize)
    draws = steps * workload.replay / len(sets)
    missed = refused = 0.0
    for blocks in sorted(sets):  # the small ones first: what is kept of them comes again soonest
        kept = min(blocks, room)
        room -= kept
        missed += kept * (1 - (1 - 1 / blocks) ** draws) / (draws * len(sets))
        refused += (1 - kept / blocks) / len(sets)
    mean = hit + missed * (filling - hit) + refused * (without - hit)
    what = f"{steps} steps, {' and '.join(f'{blocks:,}' for blocks in sets)} blocks, {budget / 1e9:g} GB"
    return Figure.plain(f"a phase's mean step with the cache / without ({what})", mean / without, "of it")


def wire(measured: float | None) -> Figure:
    """What tools/bench_ranks.py counts."""
    return Figure.at_most("gradient bytes on the wire, ours / full DDP", 0.01, measured, "of it")


def two_ranks(measured: float | None) -> Figure:
    """What tools/bench_ranks.py times."""
    return Figure.at_least("global throughput, 2 ranks on 2 cores / 1 on 1", 1.85, measured, "times")


def replay_growth(measured: float | None) -> Figure:
    """What tools/bench_growth.py weighs."""
    return Figure.at_most("peak memory, 10⁵ blocks to replay / 10³", 1.1, measured, "times")


def merged(rows: list[Figure], files: Sequence[Path]) -> list[Figure]:
    """The rows with those of other tools after them; what was asked of these and is in no file is not measured.

    A row whose name is taken gets its file's name too. Raises ValueError for a file that holds something else.
    """
    there = {row.name: row for row in rows}
    for file in files:
        for row in read_figures(file):
            name = f"{row.name} ({file.name})" if row.name in there else row.name
            there[name] = replace(row, name=name)
    for row in (wire(None), two_ranks(None), replay_growth(None)):
        there.setdefault(row.name, row)
    return list(there.values())
