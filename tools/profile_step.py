"""Where the time of a step of ours goes, as a Markdown table.

    python tools/profile_step.py [--shape gpt2|demo] [--new 4] [--replay 2] [--block 256] [--micro-blocks 4]
                                 [--dtype auto|float32|bfloat16] [--steps 3] [--threads N] [--cached] [--json FILE]

Every module of the model that is a part below is marked at its input and its output. A mark hands its tensor on and
notes the time: in the forward pass, and again when the gradient comes back through it. So the backward pass of a part
is timed too, on the clock and without a profiler's cost for each operation; a mark costs a few microseconds. What is
recomputed of the sidecars counts as theirs. The seconds are the medians of `--steps` steps, after one that counts for
nothing; their sum is the step's.

Below it stands the optimizer alone: AdamW over the sidecars' own tensors, and over one flat tensor of their size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_measure import timed
from bench_ours import Ours
from bench_workload import LEARNING_RATE, MAX_GRAD_NORM, SHAPES, Workload, base_dtype
from figures import Figure, machine, markdown, write_figures
from progress import Progress
from torch import Tensor, nn

from revpatch.distributed import cores
from revpatch.patch.families import blocks_of, body_of

PRODUCTS, ATTENTION, SIDECARS, HEAD = "base's products", "attention", "sidecars", "head and loss"
ELEMENTWISE, OPTIMIZER, REST = "GELU and layer norms", "clipping and optimizer", "the rest"
ORDER = (
    f"{PRODUCTS}, forward",
    f"{PRODUCTS}, backward",
    f"{ATTENTION}, forward",
    f"{ATTENTION}, backward",
    f"{ELEMENTWISE}, forward",
    f"{ELEMENTWISE}, backward",
    f"{SIDECARS}, forward",
    f"{SIDECARS}, backward",
    HEAD,
    OPTIMIZER,
    REST,
)
OPTIMIZER_STEPS = 30


class Stopwatch:
    """Adds up the time between changes of the part that is running."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.part, self.since = REST, time.perf_counter()
        self.backward = False
        """Whether the backward pass is running: forward passes of modules are then a part of it."""

    def change(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[self.part] = self.seconds.get(self.part, 0.0) + now - self.since
        self.part, self.since = part, now

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        self.change(REST)
        seconds, self.seconds = self.seconds, {}
        return seconds


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, watch: Stopwatch, after: str, before: str) -> Tensor:
        ctx.watch, ctx.before = watch, before
        if not watch.backward:
            watch.change(after)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.watch.change(ctx.before)
        return gradient, None, None, None


def mark(module: nn.Module, watch: Stopwatch, part: str, before: str = REST, after: str = REST) -> None:
    """Times a module as a part; `before` and `after` it in the forward pass comes what these name.

    A part without a forward and a backward of its own is one row.
    """

    def forward(name: str) -> str:
        return f"{name}, forward" if f"{name}, forward" in ORDER else name

    def backward(name: str) -> str:
        return f"{name}, backward" if f"{name}, backward" in ORDER else name

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_Mark.apply(args[0], watch, forward(part), backward(before)), *args[1:])

    def leave(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output.hidden
        hidden = _Mark.apply(hidden, watch, forward(after), backward(part))
        return hidden if isinstance(output, Tensor) else output._replace(hidden=hidden)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def mark_all(ours: Ours, watch: Stopwatch) -> None:
    """Marks the parts of a patched GPT-2; the teacher's patch too, which is another."""
    body: Any = body_of(ours.base)
    for layer, patched in enumerate(blocks_of(ours.base)):
        block: Any = patched.block
        mark(block.attn.c_attn, watch, PRODUCTS, after=ATTENTION)
        mark(block.attn.c_proj, watch, PRODUCTS, before=ATTENTION)
        for product in (block.mlp.c_fc, block.mlp.c_proj):
            mark(product, watch, PRODUCTS)
        for elementwise in (block.ln_1, block.ln_2, block.mlp.act):
            mark(elementwise, watch, ELEMENTWISE)
        for patch in (ours.patch, ours.teacher.patch):
            sidecar = None if patch is None else patch.sidecar(layer)
            if sidecar is not None:
                mark(sidecar, watch, SIDECARS)
    mark(body.ln_f, watch, ELEMENTWISE, after=HEAD)
    body.register_forward_pre_hook(lambda *_: watch.change(REST))


def step(ours: Ours, watch: Stopwatch) -> dict[str, float]:
    """Seconds of each part of one step."""
    watch.take()
    ours.optimizer.zero_grad()
    for loss in ours.losses(ours.new, ours.replay):
        watch.change(HEAD)
        watch.backward = True
        loss.backward()
        watch.backward = False
        watch.change(REST)
    watch.change(OPTIMIZER)
    torch.nn.utils.clip_grad_norm_(ours.trainable(), MAX_GRAD_NORM)
    ours.optimizer.step()
    return watch.take()


def optimizer_rows(ours: Ours) -> list[Figure]:
    """Fused AdamW over the sidecars' tensors, and over one that is as large as all of them."""
    own = ours.trainable()
    flat = nn.Parameter(torch.zeros(sum(parameter.numel() for parameter in own)))
    alone = torch.optim.AdamW([flat], lr=LEARNING_RATE, fused=True)
    rows = []
    for name, optimizer, parameters in (
        (f"fused AdamW alone, {len(own)} tensors", ours.optimizer, own),
        ("fused AdamW alone, one flat tensor of their size", alone, [flat]),
    ):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        seconds = [timed(optimizer.step) for _ in range(OPTIMIZER_STEPS)]
        rows.append(Figure.plain(name, statistics.median(seconds), "s"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--new", type=int, default=4)
    parser.add_argument("--replay", type=int, default=2)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--micro-blocks", type=int, default=4)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--cached", action="store_true", help="with what the teacher says at hand")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = base_dtype() if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    try:
        sizes = (arguments.new, arguments.replay, arguments.block)
        workload = Workload(arguments.shape, *sizes, dtype, arguments.micro_blocks)
    except ValueError as error:
        parser.error(str(error))
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: expected 1 or more")
    ours, watch = Ours(workload, cached=arguments.cached), Stopwatch()
    mark_all(ours, watch)
    found, progress = [], Progress("profile_step.py", [*["step"] * (arguments.steps + 1), "optimizer alone"])
    for _ in range(arguments.steps + 1):
        with progress.step("step"):
            found.append(step(ours, watch))
    with progress.step("optimizer alone"):
        alone = optimizer_rows(ours)
    report(workload, found[1:], alone, arguments.json)


def report(workload: Workload, found: list[dict[str, float]], alone: list[Figure], file: Path | None) -> None:
    """Prints the table, and writes the figures."""
    medians = {part: statistics.median(seconds.get(part, 0.0) for seconds in found) for part in ORDER}
    whole = sum(medians.values())
    rows = [(part, f"{seconds:.3f}", f"{100 * seconds / whole:.1f} %") for part, seconds in medians.items()]
    rows += [("in all", f"{whole:.3f}", ""), *((row.name, f"{row.measured:.4f}", "") for row in alone)]
    title = f"{workload}; ours in {workload.accumulation} micro-batches\n{machine('transformers')}"
    print(f"{title}\n\n{markdown(('part of a step', 'seconds', 'share'), rows)}")
    if file is not None:
        write_figures(
            title, [Figure.plain(f"step: {part}", value, "s") for part, value in medians.items()] + alone, file
        )


if __name__ == "__main__":
    main()
