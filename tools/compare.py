"""Ours against the other ways to teach a model: how much of the old is forgotten at the same learning of the new.

    python tools/compare.py tiny [--short | --smoke] [--list] [--only REGEX] [--also METHOD] [--budget-minutes N]
                                 [--phases N] [--store FILE.jsonl] [--json FILE] [--plot FILE.png]
    python tools/compare.py real [--data FOLDER] ...          # what tools/real_tier.py makes
    python tools/compare.py custom --base FOLDER --corpus NAME=FILE.jsonl... --old NAME=FILE... [--never NAME=FILE] ...

A comparison is made of cells: a method, a learning rate, a seed. A cell teaches the corpora one after the other and
measures all held-out sets as it goes; ours is run by `python -m revpatch train`, the others by their own libraries, all
on the same blocks in the same order. Rates are swept, and widened until the best is not at an edge. Finished cells are
kept in the store, so that a comparison that was killed goes on, and the table shows what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from compare_cells import Cell, Result, Store, cell_of, variant_of
from compare_data import fingerprint, key_of
from compare_figures import figures_of, grouped, overview
from compare_plan import plan
from compare_tiers import ROOT, Tier, custom, real, smoke, tiny
from figures import Figure, machine, show
from progress import clock_time

from revpatch.config import ConfigError

NAME = "compare.py"


class Comparison:
    """A tier's cells: which are done, and what the others will take."""

    def __init__(self, tier: Tier, store: Store, short: bool = False, also: Sequence[str] = ()) -> None:
        self.tier, self.store, self.short, self.also = tier, store, short, also
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
            wanted = list(dict.fromkeys(plan(self.tier, self.find, self.short, self.also)))
        return [cell for cell in wanted if re.search(only, cell.name)]

    def results(self) -> list[Result]:
        """All that is done, planned or not, and was run as it would be run now."""
        found = []
        for result in self.store.found.values():
            with contextlib.suppress(ConfigError):  # of a knob that the product no longer has
                if self.find(cell_of(result)) is result:
                    found.append(result)
        return found

    def missing(self, only: str) -> list[Cell]:
        """What is to be run."""
        return [cell for cell in self.cells(only) if self.find(cell) is None]

    def seconds(self) -> Callable[[Cell], float]:
        """Estimates what a cell takes: the median of the method's cells, or else of all."""
        done = self.results()
        first = self.tier.seconds_a_step * self.tier.steps * len(self.tier.corpora)
        every = statistics.median([result["seconds"] for result in done] or [first])
        by = {
            method: statistics.median(result["seconds"] for result in done if result["key"]["method"] == method)
            for method in {result["key"]["method"] for result in done}
        }
        return lambda cell: float(by.get(cell.method, every))


def check_installed() -> None:
    """Raises ValueError, with the command that installs it, if the peers' library is missing."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("expected the package peft, found none: pip install --no-deps peft==0.21.2")


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
            takes = comparison.seconds()
            free = [cell for cell in comparison.missing(only) if cell not in running.values()]
            for cell in free[: workers - len(running)]:
                if until is None or time.monotonic() + takes(cell) <= until:
                    running[pool.submit(run_cell, tier, cell)] = cell
            if not running:
                break
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                cell = running.pop(future)
                comparison.store.add({"key": comparison.key(cell), "name": cell.name, **future.result()})
                done += 1
                left = comparison.missing(only)
                estimate = clock_time(sum(map(comparison.seconds(), left)) / workers)
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
    parser.add_argument("tier", choices=["tiny", "real", "custom"])
    parser.add_argument("--short", action="store_true", help="the methods that matter most")
    parser.add_argument("--smoke", action="store_true", help="of tiny: two cells of a few steps")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="of real: what tools/real_tier.py has made")
    parser.add_argument("--base", type=Path, help="of custom: a folder with a base")
    for name, said in (("corpus", "what is taught, in this order"), ("old", "what it knows"), ("never", "nobody's")):
        words_ = f"of custom: documents, {said}"
        parser.add_argument(f"--{name}", action="append", default=[], type=named_file, metavar="NAME=FILE", help=words_)
    parser.add_argument("--also", action="append", default=[], metavar="METHOD", help="e.g. ours[sidecar.gate=token]")
    parser.add_argument("--phases", type=int, metavar="N", help="teach the first N corpora alone")
    parser.add_argument("--list", action="store_true", help="the cells, done or not, with their time; runs none")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the cells' names, as --list prints them")
    parser.add_argument("--budget-minutes", type=float, help="begin no cell that would end later than this")
    parser.add_argument("--store", type=Path, help="where finished cells are kept; docs/evidence/TIER.jsonl")
    parser.add_argument("--folder", type=Path, default=ROOT / "data/compare", help="where corpora are built")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser, parser.parse_args(words)


def named_file(words: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, equals, file = words.partition("=")
    if not name or not equals or not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"expected NAME=FILE of a file that is there, found {words!r}")
    return name, Path(file).resolve()


def tier_of(arguments: argparse.Namespace) -> Tier:
    """What is asked for.

    Raises FileNotFoundError, ValueError for what is missing or can't be read.
    """
    if arguments.tier == "real":
        return real(arguments.folder, arguments.data)
    if arguments.tier == "tiny":
        return smoke(arguments.folder) if arguments.smoke else tiny(arguments.folder)
    if arguments.base is None or not arguments.corpus:
        raise ValueError("custom: expected --base FOLDER and at least one --corpus NAME=FILE")
    sets = (dict(arguments.corpus), dict(arguments.old), dict(arguments.never))
    return custom(arguments.folder, arguments.base.resolve(), *sets)


def show_methods(comparison: Comparison) -> None:
    """Prints the table of methods."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    columns, rows = overview(comparison.tier, grouped(comparison.results()))
    title = "change of held-out losses from the unpatched base to the end, nats per token, at each method's best rate"
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if os.isatty(1) else 200).print(table)


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser, arguments = parse(words)
    try:
        re.compile(arguments.only)
        for variant in arguments.also:
            variant_of(variant)
        tier = tier_of(arguments)
        if arguments.phases is not None:
            tier = tier.begun(arguments.phases)
        file = arguments.store or ROOT / f"docs/evidence/{tier.name}.jsonl"
        comparison = Comparison(tier, Store(file), arguments.short, arguments.also)
        for cell in comparison.cells(arguments.only):
            comparison.key(cell)
        check_installed()
    except (re.error, ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if arguments.list:
        takes = comparison.seconds()
        for cell in comparison.cells(arguments.only):
            result = comparison.find(cell)
            took = "" if result is None else f"done in {clock_time(result['seconds'])}"
            print(f"{cell.name}: {took or 'about ' + clock_time(takes(cell))}")
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
