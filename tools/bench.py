"""A full step of ours against the ways in which people would do it today: time, memory, share of the arithmetic.

    python tools/bench.py [--rounds N] [--json FILE] [--threads N] [--shape gpt2|demo] [--peers a,b,...]
                          [--new 4] [--replay 2] [--block 256] [--dtype auto|float32|bfloat16]

One process, the same tokens for all, rounds interleaved: each round times one step of every peer (bench_peers.py).
Before any time is printed each peer's loss and gradient are held against the objective in float64 (bench_oracle.py):
below 1e-5 in float32 and 2e-2 in bfloat16 for ours, or there are no times. Peak memory is taken in a process of each
peer's own: the highest resident size over two steps, less that of the interpreter with its libraries.

`--dtype auto` stores frozen bases in bfloat16 where this CPU multiplies it faster than float32, and else in float32.
Rows that need a fast bfloat16 are then not measured. The arithmetic floor beside a ratio is that of the counted
operations: what it would be if both did nothing but matrix products, at one rate.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_loss import LOSSES, loss_errors
from bench_oracle import errors
from bench_peers import PEERS, Ours, Peer
from bench_workload import SHAPES, Workload
from figures import Figure, machine, show
from torch.utils.flop_counter import FlopCounterMode

from revpatch.training.launch import bfloat16_is_slow

ASKED = {
    "textbook-fp32": 5.0,
    "textbook-bf16": 2.2,
    "lora-kl": 2.0,
    "lora-lm": 1.3,
    "full-lm": 2.0,
}
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative gradient error of ours."""
PEERS_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""The same of the others: a peer beyond it does other work than it says."""
CHECKED_TOKENS = 64


def check(name: str, peer: Peer, dtype: torch.dtype) -> float:
    """The relative gradient error; stops the benchmark if it is too large."""
    wrong_loss, wrong_gradient = errors(peer, min(CHECKED_TOKENS, peer.workload.block))
    limit = (LIMIT if isinstance(peer, Ours) else PEERS_LIMIT)[dtype]
    if not (wrong_loss < limit and wrong_gradient < limit):
        sys.exit(
            f"{name}: loss off by {wrong_loss:.2g}, gradient by {wrong_gradient:.2g} of the float64 objective's; at "
            f"most {limit:g} is right in {dtype}. No times are given for a wrong step."
        )
    return wrong_gradient


def rates(dtype: torch.dtype) -> float:
    """Matrix products a second, in FLOP/s: 2048 x 2048 in `dtype`, for half a second."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    torch.mm(a, b)
    count, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < 0.5:
        torch.mm(a, b)
        count += 1
    return count * 2 * 2048**3 / seconds


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(steps: dict[str, Callable[[], object]], rounds: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds of each, and the machine's rate, round by round; one round before that counts for nothing."""
    found: dict[str, list[float]] = {name: [] for name in (*steps, "rate")}
    for number in range(rounds + 1):
        for name, step in steps.items():
            seconds = timed(step)
            if number:
                found[name].append(seconds)
        if number:
            found["rate"].append(rates(dtype))
    return found


def _attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    """Both products of causal attention, over half of the matrix; shapes (batch, heads, time, width)."""
    batch, heads, time_q, width = query
    return 2 * batch * heads * time_q * key[-2] * (width + value[-1]) // 2


def _attention_backward(
    _: list[int], query: list[int], key: list[int], value: list[int], *__: object, **___: object
) -> int:
    """Five products for the forward pass's two."""
    return _attention(query, key, value) * 5 // 2


def flops_of(peer: Peer) -> int:
    """Counted operations of one step's matrix products and attention, which torch doesn't count on CPUs."""
    cpu = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        peer.step()
    return int(counter.get_total_flops())


def memory_of(name: str, arguments: argparse.Namespace) -> float:
    """Peak bytes of two steps, in a process that does nothing else."""
    passed = [f"--{key}={getattr(arguments, key)}" for key in ("threads", "shape", "new", "replay", "block", "dtype")]
    done = subprocess.run(
        [sys.executable, __file__, f"--memory-of={name}", *passed], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{name}: its memory could not be measured:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def print_own_memory(name: str, workload: Workload) -> None:
    """What `memory_of` reads."""
    before = resident("VmRSS")
    peer = PEERS[name](workload)
    for _ in range(2):
        peer.step()
    print(resident("VmHWM") - before)


def figures_of(
    workload: Workload,
    seconds: dict[str, list[float]],
    flops: dict[str, int],
    memory: dict[str, float],
    wrong: dict[str, float],
) -> list[Figure]:
    """All rows. Ratios are medians of each round's ratio to ours without the teacher's cache, the slower of the two."""
    rows = []
    ours = seconds["ours"]
    skipped = [name for name in ASKED if name not in seconds]
    for name, limit in ASKED.items():
        if name in skipped:
            rows.append(Figure.at_least(f"{name} / ours", limit, None, "times"))
            continue
        for variant in ("ours", "ours-cached"):
            ratios = [theirs / mine for theirs, mine in zip(seconds[name], seconds[variant], strict=True)]
            label = f"{name} / {variant}"
            median = statistics.median(ratios)
            rows.append(
                Figure.at_least(label, limit, median, "times")
                if variant == "ours"
                else Figure.plain(label, median, "times")
            )
        rows.append(Figure.plain("  its minimum / minimum of ours", min(seconds[name]) / min(ours), "times"))
        rows.append(Figure.plain("  its floor, by counted operations", flops[name] / flops["ours"], "times"))
    loss_ratio = [t / o for t, o in zip(seconds["loss: textbook"], seconds["loss: ours"], strict=True)]
    rows.append(Figure.at_least("loss alone, textbook CE + KL / ours", 2.2, statistics.median(loss_ratio), "times"))
    if "loss: textbook, compiled" in seconds:
        compiled = [t / o for t, o in zip(seconds["loss: textbook, compiled"], seconds["loss: ours"], strict=True)]
        rows.append(Figure.plain("loss alone, textbook compiled / ours", statistics.median(compiled), "times"))
    if memory:
        share = memory["ours"] / memory["textbook-fp32"]
        rows.append(Figure.at_most("peak memory of a step, ours / textbook-fp32", 0.2, share, "of it"))
        rows += [Figure.plain(f"peak memory, {name}", value / 2**20, "MiB") for name, value in memory.items()]
    share = statistics.median(flops["ours"] / step / rate for step, rate in zip(ours, seconds["rate"], strict=True))
    rate_name = str(workload.dtype).removeprefix("torch.")
    is_bf16 = workload.dtype == torch.bfloat16
    rows.append(Figure.at_least("share of the bfloat16 matrix-product rate", 0.75, share if is_bf16 else None, "of it"))
    rows.append(Figure.plain(f"share of the {rate_name} matrix-product rate", share, "of it"))
    rows.append(Figure.plain(f"{rate_name} matrix-product rate", statistics.median(seconds["rate"]) / 1e9, "GFLOP/s"))
    rows += [
        Figure.plain(f"step, {name}", statistics.median(values), "s")
        for name, values in seconds.items()
        if name != "rate"
    ]
    rows += [Figure.plain(f"operations of a step, {name}", value / 1e9, "GFLOP") for name, value in flops.items()]
    rows += [Figure.plain(f"relative gradient error, {name}", value, "") for name, value in wrong.items()]
    return rows


def spread_cost(seconds: dict[str, list[float]], workload: Workload, pool: int, steps: int) -> Figure:
    """The mean step of a phase that begins with an empty cache, relative to one without: each of `pool` blocks is
    computed once, when it is first drawn, and `steps` steps draw `replay` of them each, uniformly."""
    without, hit = (statistics.median(seconds[name]) for name in ("ours", "ours-cached"))
    draws = steps * workload.replay
    misses = pool * (1 - (1 - 1 / pool) ** draws)
    mean = hit + (misses / draws) * (without - hit)
    return Figure.plain(
        f"a phase's mean step with the cache / without ({steps} steps, {pool} blocks)", mean / without, "of it"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--peers", help="names, comma-separated; ours is always there. Default: all that can run here")
    parser.add_argument("--new", type=int, default=4)
    parser.add_argument("--replay", type=int, default=2)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    slow = bfloat16_is_slow()
    if arguments.dtype == "auto":
        arguments.dtype = "float32" if slow else "bfloat16"
    dtype = torch.float32 if arguments.dtype == "float32" else torch.bfloat16
    workload = Workload(arguments.shape, arguments.new, arguments.replay, arguments.block, dtype)
    if arguments.memory_of:
        print_own_memory(arguments.memory_of, workload)
        return
    names = [name for name in PEERS if not (slow and "bf16" in name)]
    if arguments.peers is not None:
        wanted = {"ours", "ours-cached", *(name.strip() for name in arguments.peers.split(","))}
        if unknown := wanted - PEERS.keys():
            sys.exit(f"--peers: unknown {sorted(unknown)}; choose from {', '.join(PEERS)}")
        names = [name for name in names if name in wanted]
    run(arguments, workload, names)
    gc.collect()


def run(arguments: argparse.Namespace, workload: Workload, names: list[str]) -> None:
    """Checks, times, counts and weighs the peers, and prints the table."""
    peers, wrong, flops = {}, {}, {}
    for name in names:
        peers[name] = PEERS[name](workload)
        wrong[name] = check(name, peers[name], torch.bfloat16 if "bf16" in name else workload.dtype)
        flops[name] = flops_of(peers[name])
    losses = {name: make(workload) for name, make in LOSSES.items()}
    wrong |= {f"loss: {name}": value for name, value in loss_errors(losses, workload, LIMIT[workload.dtype]).items()}
    steps: dict[str, Callable[[], object]] = {name: peer.step for name, peer in peers.items()}
    steps |= {f"loss: {name}": loss.step for name, loss in losses.items()}
    seconds = measure(steps, arguments.rounds, workload.dtype)
    peers.clear()
    memory = {name: memory_of(name, arguments) for name in names}
    rows = figures_of(workload, seconds, flops, memory, wrong)
    rows.append(spread_cost(seconds, workload, pool=4096, steps=5000))
    title = f"{workload}; {arguments.rounds} rounds, medians\n{machine('transformers', 'peft')}"
    show(title, rows, arguments.json)


if __name__ == "__main__":
    main()
