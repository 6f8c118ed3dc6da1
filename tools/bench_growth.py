"""How the cost of a step grows: with the length of a block, with the batch, and with what there is to replay.

    python tools/bench_growth.py [--shape gpt2|demo] [--json FILE] [--plot docs/growth.png]

Time: full steps of ours (new blocks, half as many replayed, teacher, optimizer; micro-batches as the trainer makes
them) for blocks of 256 to 1024 tokens and 1 to 16 new blocks; the faster of two, after one that counts for nothing. A
step for which this machine has too little memory is not measured, and says how much it needs. Memory: in a process of
its own each, a replay set of 10² to 10⁵ blocks of 128 tokens, 200 steps that draw 16 blocks from it and show them to a
teacher of the demo's shape whose cache may hold 32 MB: the highest resident size, less that of the interpreter with its
libraries.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from bench_measure import last_line, timed
from bench_ours import Ours
from bench_rows import replay_growth
from bench_workload import SHAPES, Workload, base_dtype, name_of
from figures import Figure, machine, show
from progress import Progress
from random_shards import write_random_set

from revpatch.patch.patched_model import attach
from revpatch.shards.replay import ReplayMixture
from revpatch.shards.shard_set import ShardSet
from revpatch.step.teacher import Teacher, TeacherCache
from revpatch.train.startup import resident_bytes

LENGTHS, BATCHES, REPLAYS = (256, 512, 1024), (1, 2, 4, 8, 16), (10**2, 10**3, 10**4, 10**5)
REPLAY_BLOCK, REPLAY_STEPS, REPLAY_ROWS, CACHE_BYTES = 128, 200, 16, 32 * 10**6
KEPT_A_TOKEN = 24
"""Numbers that a block keeps of a token for the backward pass, in widths of the model, from above."""


def bytes_needed(workload: Workload) -> int:
    """What a step takes, from above: the model, and what a micro-batch keeps."""
    shape = SHAPES[workload.shape]
    d, tokens = shape["n_embd"], (workload.new + workload.replay) // workload.accumulation * workload.block
    parameters = 12 * shape["n_layer"] * d**2 + (shape["vocab_size"] + shape["n_positions"]) * d
    kept = KEPT_A_TOKEN * shape["n_layer"] * d * tokens
    return (parameters + kept) * workload.dtype.itemsize + 2**28


def free_bytes() -> int:
    """Memory that a process can take before the machine swaps."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    return 1024 * int(text.split("MemAvailable:")[1].split()[0])


def seconds_of(workload: Workload) -> float | str:
    """Of a step; in words how much memory it needs, if there isn't so much."""
    if (needed := bytes_needed(workload)) > free_bytes():
        return f"not measured: needs {needed / 1e9:.0f} GB"
    ours = Ours(workload)
    return min([timed(ours.step) for _ in range(3)][1:])


def print_replay_memory(folder: Path) -> None:
    """Rehearses from the set, in this process, and prints the peak."""
    before = resident_bytes()
    workload = Workload("demo", 1, 1, REPLAY_BLOCK, torch.float32)
    base = workload.model().eval().requires_grad_(False)
    cache = TeacherCache(CACHE_BYTES)
    teacher = Teacher(base, cache)
    teacher.follow(attach(base, workload.sidecar))
    mixture = ReplayMixture([ShardSet(folder)], REPLAY_ROWS, seed=0)
    teacher.expect(mixture.blocks)
    for step in range(REPLAY_STEPS):
        tokens, keys = mixture.read(step)
        teacher.hidden(torch.from_numpy(tokens), keys=keys)
    print(resident_bytes(peak=True) - before, cache.take_rate())


def memory_with(blocks: int, folder: Path) -> tuple[float, float]:
    """Peak bytes and the cache's hit rate with a replay set of so many blocks."""
    write_random_set(folder / f"{blocks}", blocks, REPLAY_BLOCK, 10_000, 4096)
    command = [sys.executable, __file__, "--replay-memory", str(folder / f"{blocks}")]
    peak, rate = last_line(command, f"the memory of replaying from {blocks} blocks").split()
    return float(peak), float(rate)


def plot(times: dict[tuple[int, int], float | str], memory: dict[int, float], shape: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), dpi=110)
    for length in LENGTHS:
        points = [(n, times[length, n]) for n in BATCHES if isinstance(times.get((length, n)), float)]
        if points:
            left.plot(*zip(*points, strict=True), marker="o", label=f"{length} tokens a block")
    left.set(xscale="log", yscale="log", xlabel="new blocks a step", ylabel="seconds a step", title=f"{shape} shape")
    left.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    left.legend()
    right.plot(list(memory), [value / 2**20 for value in memory.values()], marker="o")
    right.set(xscale="log", xlabel="blocks to replay", ylabel="peak memory, MiB", title="replaying, demo shape")
    right.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("gpt2", "demo"), default="gpt2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--most-tokens", type=int, default=16384, help="leave out batches of more new tokens")
    parser.add_argument("--replay-memory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.replay_memory is not None:
        print_replay_memory(arguments.replay_memory)
        return
    dtype = base_dtype()
    sizes = [
        (length, batch)
        for length in LENGTHS
        if length <= SHAPES[arguments.shape]["n_positions"]
        for batch in BATCHES
        if length * batch <= arguments.most_tokens
    ]
    steps = [f"{batch} new blocks of {length} tokens" for length, batch in sizes]
    replays = [f"{blocks:,} blocks to replay" for blocks in REPLAYS]
    progress, times, memory = Progress("bench_growth.py", steps + replays), {}, {}
    for (length, batch), words in zip(sizes, steps, strict=True):
        with progress.step(words):
            workload = Workload(arguments.shape, batch, max(1, batch // 2), length, dtype)
            times[length, batch] = seconds_of(workload)
    with tempfile.TemporaryDirectory() as folder:
        for blocks, words in zip(REPLAYS, replays, strict=True):
            with progress.step(words):
                memory[blocks] = memory_with(blocks, Path(folder))
    rows = [Figure.plain(f"step, {b} new blocks of {n} tokens", value, "s") for (n, b), value in times.items()]
    rows += [Figure.plain(f"peak memory, {n} blocks to replay", m / 2**20, "MiB") for n, (m, _) in memory.items()]
    rows += [Figure.plain(f"teacher's cache, {n} blocks to replay", rate, "found") for n, (_, rate) in memory.items()]
    rows.append(replay_growth(memory[REPLAYS[-1]][0] / memory[REPLAYS[1]][0]))
    show(f"{arguments.shape} shape, frozen base in {name_of(dtype)}\n{machine()}", rows, arguments.json)
    if arguments.plot is not None:
        plot(times, {blocks: peak for blocks, (peak, _) in memory.items()}, arguments.shape, arguments.plot)


if __name__ == "__main__":
    main()
