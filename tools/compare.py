"""Ours against the other ways to teach a model: how much of the old is forgotten at the same learning of the new.

    python tools/compare.py tiny [--short | --smoke] [--list] [--only REGEX] [--budget-minutes N]
                                 [--store FILE.jsonl] [--json FILE] [--plot FILE.png]

A comparison is made of cells: a method, a learning rate, a seed. A cell teaches the corpora one after the other and
measures all held-out sets as it goes; ours is run by `python -m revpatch train`, the others by their own libraries, all
on the same blocks in the same order. Rates are swept, and widened until the best is not at an edge. Finished cells are
kept in the store, so that a comparison that was killed goes on, and the table shows what there is.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from compare_cells import Cell, Result, Store
from compare_data import fingerprint, key_of
from compare_figures import figures_of, grouped, overview
from compare_plan import plan
from compare_tiers import ROOT, Tier, smoke, tiny
from figures import Figure, machine, show
from progress import clock_time

NAME = "compare.py"


class Comparison:
    """A tier's cells: which are done, and what the others will take."""

    def __init__(self, tier: Tier, store: Store, short: bool = False) -> None:
        self.tier, self.store, self.short = tier, store, short
        self.facts = fingerprint(tier)
        self._keys: dict[Cell, dict[str, Any]] = {}

    def key(self, cell: Cell) -> dict[str, Any]:
        """All that decides a cell's result."""
        if cell not in self._keys:
            self._keys[cell] = key_of(self.tier, cell, self.facts)
        return self._keys[cell]

    def find(self, cell: Cell) -> Result | None:
        """The cell's result, if it is done."""
        return self.store.get(self.key(cell))

    def cells(self, only: str = "") -> list[Cell]:
        """What is needed, as far as can be said now."""
        if self.tier.name == "smoke":
            wanted = [Cell("ours", 6e-3), Cell("lora+replay+kl", 4e-3)]
        else:
            wanted = list(dict.fromkeys(plan(self.tier, self.find, self.short)))
        return [cell for cell in wanted if re.search(only, cell.name)]

    def results(self) -> list[Result]:
        """What is done of what is needed."""
        found = [self.find(cell) for cell in self.cells()]
        return [result for result in found if result is not None]

    def seconds(self, cell: Cell) -> float:
        """An estimate of what a cell takes: the median of the method's cells, or else of all."""
        done = [result for result in map(self.find, self.cells()) if result is not None]
        alike = [result["seconds"] for result in done if result["key"]["method"] == cell.method]
        some = alike or [result["seconds"] for result in done]
        if some:
            return float(statistics.median(some))
        return self.tier.seconds_a_step * self.tier.steps * len(self.tier.corpora)


def begin_worker(threads: int) -> None:
    """Of each worker process."""
    import torch

    torch.set_num_threads(threads)


def run_cell(tier: Tier, cell: Cell) -> dict[str, Any]:
    """A cell's result, without its key; in a worker."""
    from compare_ours import run_ours
    from compare_peers import run_peer

    began = time.monotonic()
    try:
        found = run_ours(tier, cell) if cell.family == "ours" else run_peer(tier, cell)
        found["diverged"] = False
    except FloatingPointError as error:
        found = {"diverged": True, "checks": [], "said": str(error)}
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def compute(comparison: Comparison, only: str, until: float | None) -> None:
    """Runs what is missing, as many cells at a time as there are cores for, until the clock says so."""
    tier, began = comparison.tier, time.monotonic()
    workers = max(1, min(tier.workers, (os.cpu_count() or 1) // tier.threads))
    os.environ["OMP_NUM_THREADS"] = str(tier.threads)
    running: dict[Future[dict[str, Any]], Cell] = {}
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker, (tier.threads,))
    done = 0
    try:
        while True:
            missing = [cell for cell in comparison.cells(only) if comparison.find(cell) is None]
            for cell in [cell for cell in missing if cell not in running.values()][: workers - len(running)]:
                if until is None or time.monotonic() + comparison.seconds(cell) <= until:
                    running[pool.submit(run_cell, tier, cell)] = cell
            if not running:
                break
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                cell = running.pop(future)
                comparison.store.add({"key": comparison.key(cell), "name": cell.name, **future.result()})
                done += 1
                left = [one for one in comparison.cells(only) if comparison.find(one) is None]
                estimate = clock_time(sum(map(comparison.seconds, left)) / workers)
                so_far = clock_time(time.monotonic() - began)
                words = f"{NAME}: {done} of {done + len(left)}, {cell.name}; {so_far}, about {estimate} left"
                print(words, file=sys.stderr, flush=True)
    finally:
        for future in running:
            future.cancel()
        pool.shutdown(wait=False, cancel_futures=True)


def parse(words: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", choices=["tiny"])
    parser.add_argument("--short", action="store_true", help="the methods that matter most")
    parser.add_argument("--smoke", action="store_true", help="two cells of a few steps")
    parser.add_argument("--list", action="store_true", help="the cells, done or not, with their time; runs none")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the cells' names, as --list prints them")
    parser.add_argument("--budget-minutes", type=float, help="begin no cell that would end later than this")
    parser.add_argument("--store", type=Path, help="where finished cells are kept; docs/evidence/TIER.jsonl")
    parser.add_argument("--folder", type=Path, default=ROOT / "data/compare", help="where corpora are built")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser, parser.parse_args(words)


def show_methods(comparison: Comparison) -> None:
    """Prints the table of methods."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    columns, rows = overview(comparison.tier, grouped(comparison.results()))
    title = "change of held-out losses from the bare base to the end, nats per token, at each method's best rate"
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if os.isatty(1) else 200).print(table)


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser, arguments = parse(words)
    makers: dict[str, Callable[[Path], Tier]] = {"tiny": smoke if arguments.smoke else tiny}
    try:
        re.compile(arguments.only)
    except re.error as error:
        parser.error(f"--only: expected a regular expression, found {arguments.only!r} ({error})")
    tier = makers[arguments.tier](arguments.folder)
    file = arguments.store or ROOT / f"docs/evidence/{tier.name}.jsonl"
    try:
        comparison = Comparison(tier, Store(file), arguments.short)
    except ValueError as error:
        parser.error(str(error))
    if arguments.list:
        for cell in comparison.cells(arguments.only):
            result = comparison.find(cell)
            took = "" if result is None else f"done in {clock_time(result['seconds'])}"
            print(f"{cell.name}: {took or 'about ' + clock_time(comparison.seconds(cell))}")
        return
    until = None if arguments.budget_minutes is None else time.monotonic() + 60 * arguments.budget_minutes
    compute(comparison, arguments.only, until)
    show_methods(comparison)
    rows: list[Figure] = figures_of(tier, comparison.results())
    show(f"{tier.name}: {machine('transformers', 'peft')}", rows, arguments.json)
    if arguments.plot is not None:
        from compare_plot import plot

        plot(tier, comparison.results(), arguments.plot)


if __name__ == "__main__":
    main()
