"""What a training step of the demo's size waits for: data and snapshots, as shares of the step.

    python tools/bench_run.py [--steps N] [--zero STAGE ...] [--json FILE]

Workload: the demo's first phase (configs/demo.yaml: 2.6 M parameter base, in float32 where the CPU is faster in it, 16
new and 16 replayed blocks of 128 tokens) for 100 steps on two ranks of one thread each, with a log line at every step
and a snapshot at every fifth; once for each DeepSpeed ZeRO stage that is named (0 where none is, `--zero 0 1 2` for
all). The trainer's own clocks are read back from its TensorBoard files: time/step, time/waiting_for_data and
time/snapshot (what a step stands still while the state is copied; the file is written beside the steps). The first ten
steps are left out. Prints a table and exits with 1 if a figure does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import Figure, machine, show
from progress import Progress, clock_time
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from revpatch.distributed.ranks import bfloat16_is_slow

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, LOOK_EVERY = 10, 5.0
SNAPSHOT_EVERY = 5


def train(run: Path, steps: int, stage: int) -> None:
    """One run of the workload in the folder `run`, with a ZeRO stage."""
    phase = {"name": "jargon", "shards": "shards/demo/jargon", "steps": steps}
    probe = {"name": "sotu", "shards": "shards/demo/sotu_probe", "max_blocks": 16}
    settings = {
        "output_dir": f"'{run}'",
        "phases": json.dumps([phase]),
        "probes.sets": json.dumps([probe]),
        "probes.every": 10 * steps,
        "optimizer.warmup_steps": WARM_UP,
        "monitoring.every": 1,
        "snapshot.every": SNAPSHOT_EVERY,
        "engine.deepspeed": f"configs/deepspeed/zero{stage}.json",
    }
    if bfloat16_is_slow():
        settings["base.dtype"] = "float32"
    port = 20000 + random.randrange(10000)
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2", f"--master_port={port}"]
    options = [option for key, value in settings.items() for option in ("--set", f"{key}={value}")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [*launcher, "-m", "revpatch", "train", "configs/demo.yaml", *options]
    with tempfile.TemporaryFile("w+") as said:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_EVERY)
                break
            show_step(run, steps, time.monotonic() - began)
        said.seek(0)
        if process.returncode:
            raise RuntimeError(f"the run failed:\n{said.read()}")


def show_step(run: Path, steps: int, seconds: float) -> None:
    """Say how far a run is after so many seconds, by its own log: it has a line for each step."""
    log = run / "train.log"
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    found = re.findall(rf"\b(\d+)/{steps}\b", text)
    done = int(found[-1]) if found else 0
    left = f", about {clock_time(seconds * (steps - done) / done)} left" if done else ""
    print(f"bench_run.py: step {done} of {steps}{left}", file=sys.stderr, flush=True)


def figures_of(run: Path, stage: int) -> list[Figure]:
    """The shares, from the TensorBoard files of a run with this ZeRO stage."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    seconds = {
        name: [scalar.value for scalar in events.Scalars(f"time/{name}") if scalar.step > WARM_UP]
        for name in ("step", "waiting_for_data", "snapshot")
    }
    step = statistics.median(seconds["step"])
    waiting = statistics.mean(seconds["waiting_for_data"]) / statistics.mean(seconds["step"])
    snapshot = statistics.median(seconds["snapshot"]) / step
    worst = max(seconds["snapshot"]) / step
    return [
        Figure.plain(f"ZeRO {stage}: median step", 1000 * step, "ms"),
        Figure.at_most(f"ZeRO {stage}: waiting for data, mean", 0.01, waiting, "of a step"),
        Figure.at_most(f"ZeRO {stage}: standing still for a snapshot, median", 0.05, snapshot, "of a step"),
        Figure.at_most(f"ZeRO {stage}: standing still for a snapshot, longest", 0.05, worst, "of a step"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--zero", type=int, nargs="+", choices=(0, 1, 2), default=[0], metavar="STAGE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.steps < WARM_UP + SNAPSHOT_EVERY:
        parser.error(f"--steps {arguments.steps}: no snapshot is taken after the first {WARM_UP}, which are left out")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        stages = list(dict.fromkeys(arguments.zero))
        progress = Progress("bench_run.py", ["a run"] * len(stages))
        for stage in stages:
            run = Path(folder) / f"zero{stage}"
            with progress.step("a run"):
                train(run, arguments.steps, stage)
            rows += figures_of(run, stage)
    show(f"a step of the demo's size\n{machine('deepspeed')}", rows, arguments.json)
    sys.exit(0 if all(row.holds for row in rows) else 1)


if __name__ == "__main__":
    main()
