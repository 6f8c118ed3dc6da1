"""A full step of ours against the ways in which people would do it today: time, memory, share of the arithmetic.

    python tools/bench.py [--rounds N] [--json FILE] [--threads N] [--shape gpt2|demo] [--peers a,b,...]
                          [--new 4] [--replay 2] [--block 256] [--micro-blocks 4] [--dtype auto|float32|bfloat16]
                          [--checkpointing] [--compile [BACKEND]] [--device auto|cpu|cuda]
                          [--without-memory] [--merge FILE...]
    python tools/bench.py --memory-of ours,textbook-fp32 --dtype bfloat16    # their peak memory, and nothing else

One process, the same tokens for all, rounds interleaved: each round times one step of every peer (bench_peers.py).
Ours splits a step into micro-batches as the trainer does. Before any time is printed each peer's loss and gradient are
held against the objective in float64 (bench_oracle.py): below 1e-5 in float32 and 2e-2 in bfloat16 for ours, or there
are no times. Peak memory is taken in a process of each peer's own: the highest resident size over a step, less that of
the interpreter with its libraries.

Of ours there are three: without the teacher's cache, which is what is held against what is asked; "cached", with all
that is replayed in it; and "filling", with none of it in it yet. `--checkpointing` adds ours with the base's blocks
recomputed in the backward pass, as base.activation_checkpointing does; `--compile` compiles ours, as base.compile does.

On a GPU a time is the mean of ten steps that are given to it at once, and float32 products are TF32 for all when the
base is bfloat16, as ours does it (the gradients are checked without); peak memory is what its allocator
counts. FILE is written anew after each round, so that a run that is ended leaves what it had.

`--dtype auto` stores frozen bases in bfloat16 where this CPU multiplies it faster than float32, and else in float32.
Rows that need a fast bfloat16 are then not measured; `--dtype bfloat16` measures them on any CPU, at its rate:
take a small `--shape` and `--block`. The floor beside a ratio, "by counted operations", is what it would be if
both did nothing but matrix products, at one rate. `--merge` takes the rows that other tools measure (bench_ranks.py,
bench_growth.py) from what they wrote with --json, so that all that was asked is in one table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench_loss import HAS_LIGER, LOSSES, check_losses
from bench_measure import flops_of, measure, peak_of
from bench_oracle import check
from bench_ours import CACHE_BYTES
from bench_peers import ALWAYS, PEERS
from bench_rows import Found, memory_rows, merged, rows_of, spread_cost
from bench_workload import SHAPES, Workload, base_dtype
from figures import Figure, machine, show, write_figures
from progress import Progress

from revpatch.config import ReplayConfig
from revpatch.distributed import cores
from revpatch.distributed.ranks import bfloat16_is_slow

CHECKPOINTING = "ours-checkpointing"
PEAK, LOSS_CHECK = "peak memory", "gradients of the losses alone, in float64"
BASE_BLOCKS, STEPS = 100_000, 5000
"""Of what the cost of filling the cache is told: blocks of the base's own text, and steps of a phase."""


def parse(words: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--peers", help="names, comma-separated; ours are always there. Default: all that can run here")
    parser.add_argument("--new", type=int, default=4)
    parser.add_argument("--replay", type=int, default=2)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--micro-blocks", type=int, default=4, help="of ours, as the config's batch.micro_blocks")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--checkpointing", action="store_true", help=f"adds {CHECKPOINTING}")
    compile_help = "compiles ours; with another backend of torch.compile than inductor if one is named"
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help=compile_help)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--without-memory", action="store_true", help="leaves out peak memory")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--memory-of", help="names, comma-separated: measures their memory alone", metavar="NAMES")
    arguments = parser.parse_args(words)
    for name in ("rounds", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: expected 1 or more")
    return parser, arguments


def known(names: str, option: str) -> list[str]:
    """The peers of a comma-separated list; ValueError for one that there isn't."""
    wanted = [name.strip() for name in names.split(",")]
    if unknown := sorted(set(wanted) - PEERS.keys()):
        raise ValueError(f"{option}: unknown {', '.join(unknown)}; choose from {', '.join(PEERS)}")
    return wanted


def chosen(arguments: argparse.Namespace, slow: bool) -> tuple[list[str], str]:
    """The peers to measure, in the order in which they are known, and a word on those that can't be here."""
    wanted = set(PEERS) - {CHECKPOINTING}
    if arguments.peers is not None:
        wanted = {*ALWAYS, *known(arguments.peers, "--peers")}
    if arguments.checkpointing:
        wanted.add(CHECKPOINTING)
    left_out = {name for name in wanted if slow and "bf16" in name and arguments.dtype != "bfloat16"}
    note = ", ".join(sorted(left_out)) + ": left out, as this CPU is slower in bfloat16 than in float32"
    return [name for name in PEERS if name in wanted - left_out], note if left_out else ""


def main() -> None:
    parser, arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU that it can use here")
    dtype = base_dtype(arguments.device) if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    sizes = (arguments.new, arguments.replay, arguments.block)
    try:
        device, backend = arguments.device, arguments.compile
        workload = Workload(arguments.shape, *sizes, dtype, arguments.micro_blocks, device, backend)
        if arguments.memory_of is not None:
            weigh(known(arguments.memory_of, "--memory-of"), workload, arguments)
            return
        names, note = chosen(arguments, slow=device == "cpu" and bfloat16_is_slow())
        merged([], arguments.merge)  # a wrong file is refused before hours of measuring
    except ValueError as error:
        parser.error(str(error))
    if note:
        print(note, file=sys.stderr)
    found = Found(workload)

    def keep() -> None:
        """Writes what there is after a round."""
        if arguments.json is not None:
            so_far = f"; {len(found.seconds['rate'])} of {arguments.rounds} rounds, medians"
            write_figures(head(workload, so_far, note), merged(table(found), arguments.merge), arguments.json)

    measured(names, found, arguments, keep)
    title = head(workload, f"; {arguments.rounds} rounds, medians", note)
    show(title, merged(table(found), arguments.merge), arguments.json)


def table(found: Found) -> list[Figure]:
    """The rows of what was measured."""
    pool = ReplayConfig().blocks_per_phase
    spread = [spread_cost(found, CACHE_BYTES, sets, STEPS) for sets in ([pool], [pool, BASE_BLOCKS])]
    return rows_of(found) + spread


def head(workload: Workload, rounds: str, note: str) -> str:
    """What was measured, on what."""
    split = f"; ours in {workload.accumulation} micro-batches"
    packages = ("transformers", "peft", *(("liger-kernel",) if HAS_LIGER else ()))
    return "\n".join(filter(None, (f"{workload}{split}{rounds}", machine(*packages), note)))


def weigh(names: list[str], workload: Workload, arguments: argparse.Namespace) -> None:
    """The memory alone, of one step each: also of types in which nobody would wait for a time."""
    memory, progress = {}, Progress("bench.py", [PEAK] * len(names))
    for name in names:
        with progress.step(PEAK):
            memory[name] = peak_of(name, workload, arguments.threads)
    show(head(workload, "", ""), memory_rows(memory, workload), arguments.json)


def measured(names: list[str], found: Found, arguments: argparse.Namespace, keep: Callable[[], None]) -> None:
    """Checks, counts, times and weighs the peers; `keep` is called whenever there is more."""
    peers, workload = {}, found.workload
    timed = [*names, *(f"loss: {name}" for name in LOSSES), "rate"]
    weighed = [] if arguments.without_memory else names
    checks = [f"gradient of {name}, in float64" for name in names]
    progress = Progress("bench.py", [*checks, LOSS_CHECK, *timed * (arguments.rounds + 1), *[PEAK] * len(weighed)])
    for name, words in zip(names, checks, strict=True):
        with progress.step(words):
            peers[name] = PEERS[name](workload)
            # Of ours that are compiled the first is checked so; the others are the same code, and compiling takes long.
            eager = workload.backend is not None and name != "ours"
            with torch.compiler.set_stance("force_eager" if eager else "default"):
                found.wrong[name] = check(name, peers[name])
            found.flops[name] = flops_of(peers[name])
    with progress.step(LOSS_CHECK):
        found.wrong |= {f"loss: {name}": value for name, value in check_losses(workload).items()}
    steps: dict[str, Callable[[], object]] = {name: peer.step for name, peer in peers.items()}
    steps |= {f"loss: {name}": make(workload).step for name, make in LOSSES.items()}
    if workload.device == "cuda" and workload.dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high")
    measure(steps, arguments.rounds, workload, progress, found.seconds, keep)
    steps.clear()
    peers.clear()  # room for those whose memory is measured
    for name in weighed:
        with progress.step(PEAK):
            found.memory[name] = peak_of(name, workload, arguments.threads)
        keep()


if __name__ == "__main__":
    main()
