"""How two ranks on two cores compare with one rank on one, and what they send each other.

    python tools/bench_ranks.py [--rounds 3] [--shape gpt2|demo] [--steps 3] [--engine deepspeed|accelerate]
                                [--json FILE]

Each rank is bound to a core of its own with one thread, holds the whole frozen base and trains on 2 new and 1 replayed
blocks of 256 tokens a step (gpt2) or 8 and 8 of 128 (demo), so that the global batch grows with the ranks. The engine
is the trainer's (DeepSpeed with ZeRO 0 by default), on gloo. One rank and two are started in turn, round by round; the
figure is the ratio of the median global throughputs. The bytes are counted in the profiler's record of the process
group over one optimizer step, and held against full data-parallel fine-tuning, which sends 4 bytes for each parameter
of the model: that is counted in the same way, on a tiny model under DistributedDataParallel.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_rows import two_ranks, wire
from bench_workload import SHAPES, Workload, base_dtype, name_of
from figures import Figure, machine, show
from progress import Progress
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from wire import bytes_sent

from revpatch.distributed import Launch
from revpatch.distributed.ranks import process_group
from revpatch.patch.patched_model import attach
from revpatch.step.engine import MicroBatch, make_engine
from revpatch.step.frozen_base import make_lean
from revpatch.step.objective import PatchObjective
from revpatch.step.teacher import Teacher

BATCH = {"gpt2": (2, 1, 256), "demo": (8, 8, 128), "tiny": (2, 1, 32)}
"""New and replayed blocks a rank, tokens a block."""


def rank(shape: str, steps: int, engine_kind: str, out: Path) -> None:
    """What each rank does; rank 0 writes seconds and bytes."""
    launch = Launch.from_environment()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[launch.local_rank % len(cores)]})
    torch.set_num_threads(1)
    new, replay, block = BATCH[shape]
    dtype = base_dtype()
    workload = Workload(shape, new, replay, block, dtype, new + replay)
    with process_group(launch, launch.device(), 30.0) as peers:
        base = workload.model(dtype).eval().requires_grad_(False)
        patch = attach(base, workload.sidecar)
        make_lean(base)
        objective = PatchObjective(base, patch, Teacher(base), workload.objective)
        engine = make_engine(workload.run_config(engine_kind, peers.world), objective, peers)
        batch = [MicroBatch(*workload.tokens(seed=peers.rank))]
        engine.train_step(batch, 1e-4)
        peers.gather(None)
        start = time.perf_counter()
        for _ in range(steps):
            engine.train_step(batch, 1e-4)
        peers.gather(None)
        seconds = (time.perf_counter() - start) / steps
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
            engine.train_step(batch, 1e-4)
        ddp = ddp_bytes_a_parameter() if peers.world > 1 else 0.0
        if peers.rank == 0:
            full = sum(p.numel() for p in base.parameters()) * 4
            tokens = peers.world * (new + replay) * block
            found = {
                "seconds": seconds,
                "tokens": tokens,
                "bytes": sum(bytes_sent(record).values()),
                "full": full,
                "ddp": ddp,
            }
            out.write_text(json.dumps(found | {"dtype": name_of(dtype)}), encoding="utf-8")


def ddp_bytes_a_parameter() -> float:
    """Gradient bytes that full fine-tuning all-reduces in a step, counted on a tiny model, for each parameter."""
    workload = Workload("tiny", 1, 1, 32, torch.float32)
    model = DistributedDataParallel(workload.model())
    tokens, _ = workload.tokens()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return bytes_sent(record)["gloo:all_reduce"] / sum(p.numel() for p in model.parameters())


def launch(world: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One start of so many ranks, and what rank 0 found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = folder / "found.json"
    torchrun = [str(Path(sys.executable).parent / "torchrun"), f"--nproc_per_node={world}", f"--master_port={port}"]
    options = [f"--{name}={getattr(arguments, name)}" for name in ("shape", "steps", "engine")]
    command = [*torchrun, __file__, f"--rank-out={out}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{world} ranks failed:\n{done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--engine", choices=("deepspeed", "accelerate"), default="deepspeed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_out is not None:
        rank(arguments.shape, arguments.steps, arguments.engine, arguments.rank_out)
        return
    speeds: dict[int, list[float]] = {1: [], 2: []}
    started = {1: "1 rank", 2: "2 ranks"}
    progress = Progress("bench_ranks.py", list(started.values()) * arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for world, found_speeds in speeds.items():
                with progress.step(started[world]):
                    found = launch(world, arguments, Path(folder))
                found_speeds.append(found["tokens"] / found["seconds"])
    one, two = (statistics.median(values) for values in speeds.values())
    new, replay, block = BATCH[arguments.shape]
    rows = [
        two_ranks(two / one),
        wire(found["bytes"] / found["full"]),
        Figure.plain("bytes all-reduced a step, ours", found["bytes"], "bytes"),
        Figure.plain("bytes of full DDP, 4 a parameter", found["full"], "bytes"),
        Figure.plain("bytes of full DDP a parameter, counted on a tiny model", found["ddp"], "bytes"),
        Figure.plain("1 rank", one, "tokens/s"),
        Figure.plain("2 ranks", two, "tokens/s"),
    ]
    batch = f"{new} new + {replay} replayed blocks of {block} tokens a rank"
    what = f"{arguments.shape} shape, frozen base in {found['dtype']}, {arguments.engine}, {batch}"
    show(f"{what}\n{machine()}", rows, arguments.json)


if __name__ == "__main__":
    main()
