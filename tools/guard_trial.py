"""Does the guard roll back what really hurts, and leave clean runs alone?

    python tools/guard_trial.py [--times N] [--language FILE.jsonl] [--only REGEX] [--budget-minutes N] [--list]
                                [--store FILE.jsonl] [--folder FOLDER] [--json FILE]

A trial is a short run of `python -m revpatch train` on the bundled base. Rollback and tolerance are the config's
defaults, and what is guarded is held-out text that the base itself wrote. Most kinds that hurt replay nothing, as
replay alone would keep the harm within tolerance; clean kinds replay the base's own text, as runs do by default.
Trials of a kind differ in the seed. Whether a kind really hurts is measured too: its control is the first seed's run
with tolerances that nothing exceeds. Finished trials are kept in the store, so that a call that was killed goes on.

No probe is before step 20. In the first steps of a phase, about 10 here and more with the default warm-up, the gates
open on old text as well, and clean runs forget more than the tolerance until the gates tell old from new: a probe just
then rolls them back. By default the first is at step 500.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from compare_cells import Result, Store
from compare_data import UNGUARDED
from compare_text import Shelf
from compare_tiers import ROOT
from figures import Figure, machine, show
from progress import clock_time

from revpatch.config import OWN_TEXT, SELF, Config, OptimizerConfig, ProbeSetConfig
from revpatch.durable import sha256_of_file
from revpatch.ledger.journal import Journal
from revpatch.shards.format import Manifest

NAME = "guard_trial.py"
BASE = ROOT / "shards/demo_base"
BLOCK, OWN_BLOCKS, STEPS, PROBE_EVERY, WARMUP = 128, 512, 40, 20, 10
NEW_BLOCKS, REPLAY_BLOCKS = 8, 4
WORKERS = 2
"""Trials at a time, of one thread each, where there are cores for them."""
FIRST_GUESS = 30.0
"""Seconds a trial, until one is done."""
RECIPE = 1
"""Counted up when the guard decides, or the trainer trains, otherwise than before: what was measured then is measured
anew."""
TOLERANCE = ProbeSetConfig(name=OWN_TEXT, shards="none").tolerance
"""Of the base's own text, in nats per token."""
CAUGHT, DISTURBED, CONFIDENCE = 0.99, 0.01, 0.95
"""Of the runs that hurt at least so many are to be rolled back, of the clean ones at most so many."""


@dataclass(frozen=True)
class Kind:
    """What a trial's run is fed.

    `hurts`: it is to be rolled back. `replays`: the base's own text. `rate`: times the default learning rates, of the
    gates too.
    """

    name: str
    shards: str
    hurts: bool
    replays: bool = True
    rate: float = 1.0


@dataclass(frozen=True)
class Trial:
    """One run; with `guarded` false the control."""

    kind: Kind
    seed: int
    guarded: bool = True

    @property
    def name(self) -> str:
        """What --only looks at."""
        return f"{self.kind.name} seed={self.seed}{'' if self.guarded else ' control'}"


@dataclass(frozen=True)
class Bench:
    """What all trials share: the kinds, the base's own text (replayed and held-out part) and the folder it is in."""

    kinds: tuple[Kind, ...]
    own: tuple[str, str]
    folder: Path

    @classmethod
    def make(cls, folder: Path, language: Path | None) -> Bench:
        """Builds what is not there. Raises FileNotFoundError, ValueError for a file of documents that can't be used."""
        shelf, demo = Shelf(folder.absolute(), BASE, BLOCK, threads=1), ROOT / "shards/demo"
        kinds = [
            Kind("scrambled", f"{demo}/scrambled", hurts=True, replays=False, rate=3.0),
            Kind("scrambled-replaying", f"{demo}/scrambled", hurts=True, rate=3.0),
            Kind("fast", f"{demo}/jargon", hurts=True, replays=False, rate=10.0),
            Kind("jargon", f"{demo}/jargon", hurts=False),
            Kind("devil", f"{demo}/devil", hurts=False),
            Kind("python", shelf.build("python", shelf.python())[0], hurts=False),
        ]
        if language is not None:
            kinds.insert(3, Kind("language", shelf.build("language", language)[0], hurts=True, replays=False))
        return cls(tuple(kinds), shelf.own(OWN_BLOCKS), shelf.folder)

    def trials(self, times: int, only: str = "") -> list[Trial]:
        """The controls, and then the kinds in turn, seed by seed, so that a short call has some of each."""
        controls = [Trial(kind, 0, guarded=False) for kind in self.kinds]
        wanted = controls + [Trial(kind, seed) for seed in range(times) for kind in self.kinds]
        return [trial for trial in wanted if re.search(only, trial.name)]

    def config(self, trial: Trial, output: Path) -> dict[str, Any]:
        """The config of a trial's run; rollback and tolerances are left to their defaults, but in a control."""
        kind, rates = trial.kind, OptimizerConfig()
        data: dict[str, Any] = {
            "output_dir": str(output),
            "seed": trial.seed,
            "base": {"model": str(BASE), "dtype": "float32", "block_size": BLOCK},
            "optimizer": {
                "lr": rates.lr * kind.rate,
                "gate_lr": rates.gate_lr * kind.rate,
                "warmup_steps": WARMUP,
            },
            "batch": {
                "new_blocks": NEW_BLOCKS,
                "replay_blocks": REPLAY_BLOCKS if kind.replays else 0,
                "micro_blocks": NEW_BLOCKS + REPLAY_BLOCKS,
            },
            "build": {"folder": str(self.folder)},
            "phases": [{"name": kind.name, "shards": kind.shards, "steps": STEPS}],
            "probes": {"every": PROBE_EVERY},
            "engine": {"kind": "accelerate"},
            "monitoring": {"every": PROBE_EVERY, "tensorboard": False, "samples": {"max_new_tokens": 0}},
        }
        if kind.replays:
            data["replay"] = {"base": SELF if trial.guarded else self.own[0], "own_blocks": OWN_BLOCKS}
        if not (kind.replays and trial.guarded):  # else the trainer adds this set itself
            data["probes"]["sets"] = [{"name": OWN_TEXT, "shards": self.own[1]}]
        if not trial.guarded:
            data["probes"]["sets"][0]["tolerance"] = UNGUARDED
            data["rollback"] = {"max_drift": UNGUARDED}
        return data

    def key(self, trial: Trial) -> dict[str, Any]:
        """All that decides what comes of a trial: the config with every default, and digests in the place of paths."""
        settings = Config.model_validate(self.config(trial, Path("run"))).model_dump(mode="json")
        for place in ("output_dir", "build", "monitoring", "snapshot", "stream"):
            del settings[place]
        del settings["base"]["model"], settings["phases"][0]["shards"], settings["replay"]["base"]
        for probe in settings["probes"]["sets"]:
            del probe["shards"]
        read = {"new": trial.kind.shards, "held_out": self.own[1]}
        if trial.kind.replays:
            read["replayed"] = self.own[0]
        return {
            "kind": trial.kind.name,
            "seed": trial.seed,
            "guarded": trial.guarded,
            "recipe": RECIPE,
            "base": _digest_of_base(),
            "shards": {name: _digest(place) for name, place in read.items()},
            "settings": settings,
        }

    def results(self, store: Store) -> list[Result]:
        """All that is done and was run as it would be run now."""
        kinds, found = {kind.name: kind for kind in self.kinds}, []
        for result in store.found.values():
            key = result["key"]
            if key["kind"] in kinds and self.key(Trial(kinds[key["kind"]], key["seed"], key["guarded"])) == key:
                found.append(result)
        return found


@cache
def _digest(shards: str) -> str:
    return Manifest.read(Path(shards)).digest


@cache
def _digest_of_base() -> list[str]:
    return [sha256_of_file(file) for file in sorted(BASE.glob("*.safetensors"))]


def run_trial(bench: Bench, trial: Trial) -> dict[str, Any]:
    """What came of a trial. Raises RuntimeError when the trainer failed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run, file = Path(folder) / "run", Path(folder) / "config.json"
        file.write_text(json.dumps(bench.config(trial, run)), encoding="utf-8")
        environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = [sys.executable, "-m", "revpatch", "train", str(file)]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{trial.name}: the trainer failed: {(done.stderr or done.stdout).strip()[-2000:]}")
        found = outcome(Journal(run / "ledger/journal.jsonl", readonly=True).records())
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def outcome(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a journal says of the guard: the probes, the rollbacks, and the guarded sets at each commit."""
    return {
        "probes": [
            {"step": event["step"], "sets": _guarded(event["sets"], "rise", "low", "high", "drift")}
            for event in events
            if event["event"] == "probe"
        ],
        "rollbacks": [
            {"step": event["step"], "reason": event["reason"]} for event in events if event["event"] == "rollback"
        ],
        "commits": [
            {"step": event["step"], "sets": _guarded(event["sets"], "drift", "tolerance")}
            for event in events
            if event["event"] == "commit"
        ],
    }


def _guarded(sets: dict[str, dict[str, Any]], *fields: str) -> dict[str, dict[str, float | None]]:
    """These fields of the guarded sets; null for what is no number, which the journal has as a string."""
    found: dict[str, dict[str, float | None]] = {}
    for name, values in sets.items():
        if values["guarded"]:
            numbers = {field: float(values[field]) for field in fields}
            found[name] = {field: round(x, 6) if math.isfinite(x) else None for field, x in numbers.items()}
    return found


def compute(bench: Bench, store: Store, wanted: Sequence[Trial], until: float | None) -> None:
    """Runs what is missing, `WORKERS` at a time, until the clock says so. Raises RuntimeError as `run_trial`."""
    workers, began = max(1, min(WORKERS, os.cpu_count() or 1)), time.monotonic()
    missing = [trial for trial in wanted if store.get(bench.key(trial)) is None]
    running: dict[Future[dict[str, Any]], Trial] = {}
    total, done = len(missing), 0
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            takes = seconds(bench.results(store))
            while missing and len(running) < workers and (until is None or time.monotonic() + takes <= until):
                trial = missing.pop(0)
                running[pool.submit(run_trial, bench, trial)] = trial
            if not running:
                break
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                trial = running.pop(future)
                store.add({"key": bench.key(trial), "name": trial.name, **future.result()})
                done += 1
                so_far = clock_time(time.monotonic() - began)
                left = clock_time((total - done) * seconds(bench.results(store)) / workers)
                words = f"{NAME}: {done} of {total}, {trial.name}; {so_far}, about {left} left"
                print(words, file=sys.stderr, flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def seconds(results: Sequence[Result]) -> float:
    """What a trial takes."""
    return float(statistics.median([result["seconds"] for result in results] or [FIRST_GUESS]))


def at_least(hits: int, of: int) -> float:
    """The least share that is compatible with so many hits, at `CONFIDENCE`, one-sided (Clopper and Pearson)."""
    low, high = 0.0, 1.0 if hits else 0.0
    for _ in range(50):
        share = (low + high) / 2
        as_many = math.fsum(_binomial(k, of, share) for k in range(hits, of + 1)) if share else 0.0
        low, high = (share, high) if as_many < 1 - CONFIDENCE else (low, share)
    return low


def _binomial(k: int, of: int, share: float) -> float:
    """The chance of k hits."""
    ways = math.lgamma(of + 1) - math.lgamma(k + 1) - math.lgamma(of - k + 1)  # a float can't hold the number itself
    return math.exp(ways + k * math.log(share) + (of - k) * math.log1p(-share))


def figures_of(kinds: Sequence[Kind], results: Sequence[Result]) -> list[Figure]:
    """Kind by kind what its control and its trials show, then what was asked."""
    trials = [result for result in results if result["key"]["guarded"]]
    controls = {result["key"]["kind"]: result for result in results if not result["key"]["guarded"]}
    rows = []
    for kind in kinds:
        rows.append(_control(kind, controls.get(kind.name)))
        own = [trial for trial in trials if trial["key"]["kind"] == kind.name]
        steps = [trial["rollbacks"][0]["step"] for trial in own if trial["rollbacks"]]
        rows.append(Figure.plain(f"{kind.name}: rolled back", f"{len(steps)} of {len(own)}", "runs"))
        if steps:
            rows.append(Figure.plain(f"{kind.name}: first rolled back, median", statistics.median(steps), "step"))
    hurt, clean = (
        [trial for trial in trials if trial["key"]["kind"] in {kind.name for kind in kinds if kind.hurts is hurts}]
        for hurts in (True, False)
    )
    caught, disturbed = (sum(bool(trial["rollbacks"]) for trial in some) for some in (hurt, clean))
    name = "runs with a real regression that were rolled back"
    rows.append(Figure.at_least(name, CAUGHT, caught / len(hurt) if hurt else None, f"of {len(hurt)}"))
    if hurt:
        rows.append(Figure.plain(f"{name}, {CONFIDENCE:.0%} bound", f">= {at_least(caught, len(hurt)):.3f}", "share"))
    name = "clean runs that were rolled back"
    rows.append(Figure.at_most(name, DISTURBED, disturbed / len(clean) if clean else None, f"of {len(clean)}"))
    if clean:
        bound = 1 - at_least(len(clean) - disturbed, len(clean))
        rows.append(Figure.plain(f"{name}, {CONFIDENCE:.0%} bound", f"<= {bound:.3f}", "share"))
    drifts = [
        set_["drift"] / set_["tolerance"]
        for trial in trials
        for commit in trial["commits"]
        for set_ in commit["sets"].values()
    ]
    name = "every guarded probe within its tolerance at every commit"
    within = sum(drift <= 1 for drift in drifts) / len(drifts) if drifts else None
    rows.append(Figure.at_least(name, 1.0, within, f"of {len(drifts)}"))
    if drifts:
        rows.append(Figure.plain("largest rise of a guarded set at a commit", max(drifts), "of its tolerance"))
    return rows


def _control(kind: Kind, control: Result | None) -> Figure:
    """What hurts must have raised the base's own text by the end; what is clean must not have at any probe."""
    unit = "nats a token"
    rises = [] if control is None else [probe["sets"][OWN_TEXT]["drift"] for probe in control["probes"]]
    rises = [math.inf if rise is None else rise for rise in rises]
    if kind.hurts:
        name = f"{kind.name}: own text's rise by the end, unguarded"
        return Figure.at_least(name, TOLERANCE, rises[-1] if rises else None, unit)
    name = f"{kind.name}: own text's largest rise, unguarded"
    return Figure.at_most(name, TOLERANCE, max(rises) if rises else None, unit)


def surprises(kinds: Sequence[Kind], results: Sequence[Result]) -> list[str]:
    """A line for each run that hurt and was not rolled back, and for each clean one that was."""
    hurts, lines = {kind.name: kind.hurts for kind in kinds}, []
    for result in results:
        if result["key"]["guarded"] and hurts[result["key"]["kind"]] is not bool(result["rollbacks"]):
            rises = [f"{probe['sets'][OWN_TEXT]['drift']:+.4f} at {probe['step']}" for probe in result["probes"]]
            said = [f"rolled back at {back['step']}: {back['reason']}" for back in result["rollbacks"]]
            lines.append(f"{result['name']}: {'; '.join(said) or 'not rolled back'} (drift {', '.join(rises)})")
    return lines


def parse(words: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100, metavar="N", help="trials of each kind")
    said = "documents in another language, such as tools/real_tier.py makes; without it that kind is left out"
    parser.add_argument("--language", type=Path, metavar="FILE.jsonl", help=said)
    parser.add_argument("--list", action="store_true", help="the trials, done or not; runs none")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the trials' names, as --list prints them")
    parser.add_argument("--budget-minutes", type=float, help="begin no trial that would end later than this")
    parser.add_argument("--store", type=Path, default=ROOT / "docs/evidence/guard.jsonl", help="of finished trials")
    parser.add_argument("--folder", type=Path, default=ROOT / "data/guard", help="where corpora are built")
    parser.add_argument("--json", type=Path)
    return parser, parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser, arguments = parse(words)
    try:
        re.compile(arguments.only)
        store = Store(arguments.store)
        bench = Bench.make(arguments.folder, arguments.language)
    except (re.error, ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    wanted = bench.trials(arguments.times, arguments.only)
    if arguments.list:
        takes = clock_time(seconds(bench.results(store)))
        for trial in wanted:
            result = store.get(bench.key(trial))
            print(f"{trial.name}: {'about ' + takes if result is None else 'done in ' + clock_time(result['seconds'])}")
        return
    if arguments.language is None:
        print(f"{NAME}: no --language FILE.jsonl, so another language is left out", file=sys.stderr)
    until = None if arguments.budget_minutes is None else time.monotonic() + 60 * arguments.budget_minutes
    try:
        compute(bench, store, wanted, until)
    except RuntimeError as error:
        parser.exit(1, f"{NAME}: {error}\n")
    results = bench.results(store)
    for line in surprises(bench.kinds, results):
        print(line)
    rows = figures_of(bench.kinds, results)
    if arguments.language is None:
        rows.append(Figure.plain("language: rolled back", "left out: no --language FILE.jsonl", "runs"))
    show(f"the guard on the bundled base: {machine('transformers')}", rows, arguments.json)


if __name__ == "__main__":
    main()
