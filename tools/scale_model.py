"""The arithmetic of a step past one machine: FLOPs, bytes and the wire for 8, 64 and 1024 GPUs.

    python tools/scale_model.py [--peak 312] [--float32 156] [--efficiency 0.35 | --measured BENCH.json] [--bus 25]
                                [--latency 30] [--markdown]

Nothing here was measured on a GPU. Assumed, each a flag:
- a GPU's bfloat16 peak, TFLOP/s, for the products with frozen weights and attention, and its float32 peak for those
  of the sidecars, which are float32 on any base (312 and 156 are an A100's data sheet, the latter with TF32,
  as on any bfloat16 base; without it 19.5);
- the share of both peaks that a step reaches. That is the unknown: `--measured` takes it from what bench.py wrote with
  --json (its share of the matrix-product rate, of a CPU), and nobody has measured it on a GPU;
- the bus bandwidth of an all-reduce between nodes, GB/s a GPU, and its latency, microseconds a ring hop. Ring
  all-reduce: 2·(n−1)/n · bytes / bus + 2·(n−1) · latency / 8, a node of 8 counting as one hop in eight;
- a step: 4 new and 2 replayed blocks of 1024 tokens a GPU (weak scaling), or 256 and 128 in all (strong scaling, from
  the world size on where a GPU has less than one block: not shown);
- probes: 3 sets of 128 blocks every 500 steps; snapshots: 12 bytes a sidecar parameter every 1000 steps, copied at
  2 GB/s (the file is written beside the steps); tokens on disk: 2 bytes each.

Counted (a test holds the formula against torch's counter):
- forward of a block of T tokens: L·(24·d²·T + 2·d·T² + 4·d·r·T) + 2·V·d·T (causal attention: half of the matrix);
- a step: forward of all blocks; backward through the frozen maps once more, through attention 2.5 times, both without
  the first block; sidecars three times; the head once more; the teacher's forward on replay, of which a cache leaves
  the head.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from figures import markdown, read_figures
from rich.console import Console
from rich.table import Table

MODELS = {"124M": (12, 768), "355M": (24, 1024), "774M": (36, 1280), "1.5B": (48, 1600)}
"""GPT-2's four sizes: blocks and width."""
VOCABULARY, BLOCK, BOTTLENECK = 50257, 1024, 64
NEW, REPLAY = 4, 2
WORLDS = (8, 64, 1024)
PROBE_BLOCKS, PROBE_EVERY, SNAPSHOT_EVERY = 3 * 128, 500, 1000
GLOBAL_NEW, GLOBAL_REPLAY = 256, 128
TOLERATED = 0.01
"""Share of the time that the other ranks may wait for rank 0's probes."""


class Work(NamedTuple):
    """Operations, by the type in which they are done."""

    base: float
    """Products with frozen weights, and attention: in the base's type."""
    sidecars: float
    """In float32."""

    @property
    def total(self) -> float:
        return self.base + self.sidecars


@dataclass(frozen=True)
class Machine:
    """Assumed; see the head of this file."""

    peak: float
    float32: float
    efficiency: float
    bus: float
    latency: float

    def seconds(self, work: Work) -> float:
        return (work.base / self.peak + work.sidecars / self.float32) / (1e12 * self.efficiency)

    def all_reduce(self, size: float, world: int) -> float:
        return 2 * (world - 1) / world * size / (self.bus * 1e9) + 2 * (world - 1) * self.latency * 1e-6 / 8


@dataclass(frozen=True)
class Shape:
    """One model and its patch."""

    blocks: int
    width: int

    @property
    def sidecar(self) -> int:
        """Parameters of one sidecar: F and G of d/2 → r → d/2 with biases, the gate and the scale."""
        return 2 * (self.width * BOTTLENECK + BOTTLENECK + self.width // 2) + self.width + 2

    @property
    def trained(self) -> int:
        return self.blocks * self.sidecar

    @property
    def parameters(self) -> int:
        d = self.width
        return self.blocks * (12 * d * d + 13 * d) + (VOCABULARY + BLOCK) * d + 2 * d

    def parts(self) -> tuple[float, float, float, float]:
        """Forward of one block of tokens: all frozen linear maps, all attention, all sidecars, the head."""
        d, tokens = self.width, BLOCK
        return (
            self.blocks * 24 * d**2 * tokens,
            self.blocks * 2 * d * tokens**2,
            self.blocks * 4 * d * BOTTLENECK * tokens,
            2 * VOCABULARY * d * tokens,
        )

    def forward(self) -> Work:
        """One block of tokens through everything."""
        linear, attention, sidecars, head = self.parts()
        return Work(linear + attention + head, sidecars)

    def step(self, new: float, replay: float, cached: bool) -> Work:
        """One step on so many blocks."""
        linear, attention, sidecars, head = self.parts()
        # Before the first sidecar nothing learns. Sidecars: recomputed, then gradients of inputs and of weights.
        backward = (linear + 2.5 * attention) * (1 - 1 / self.blocks) + head
        forward = self.forward()
        teacher = Work(head, 0.0) if cached else forward
        return Work(
            (new + replay) * (forward.base + backward) + replay * teacher.base,
            (new + replay) * 4 * sidecars + replay * teacher.sidecars,
        )


def weak(machine: Machine) -> list[list[str]]:
    """A GPU's share is the same whatever their number is."""
    rows = []
    for name, (blocks, width) in MODELS.items():
        shape = Shape(blocks, width)
        work = shape.step(NEW, REPLAY, cached=False)
        seconds = machine.seconds(work)
        probe = PROBE_BLOCKS * machine.seconds(shape.forward())
        for world in WORLDS:
            ours, full = 4 * shape.trained, 4 * shape.parameters
            rows.append(
                [
                    name,
                    f"{world:,}",
                    f"{work.total / 1e12:.1f}",
                    f"{work.sidecars / 1e12:.2f}",
                    f"{1e3 * seconds:.0f}",
                    f"{ours / 1e6:.1f} / {full / 1e6:,.0f}",
                    f"{100 * ours / full:.2f} %",
                    f"{100 * machine.all_reduce(ours, world) / seconds:.1f} %",
                    f"{100 * machine.all_reduce(full, world) / seconds:.1f} %",
                    f"{100 * probe / (PROBE_EVERY * seconds):.2f} %",
                    f"{100 * (12 * shape.trained / 2e9) / (SNAPSHOT_EVERY * seconds):.4f} %",
                    f"{world * (NEW + REPLAY) * BLOCK * 2 / seconds / 1e6:.1f}",
                ]
            )
    return rows


def strong(machine: Machine) -> list[list[str]]:
    """The global batch is fixed, so a step gets shorter with every GPU and rank 0's probes do not."""
    rows = []
    for name, (blocks, width) in MODELS.items():
        shape = Shape(blocks, width)
        whole = machine.seconds(shape.step(GLOBAL_NEW, GLOBAL_REPLAY, cached=False))
        probe = PROBE_BLOCKS * machine.seconds(shape.forward())
        shares = [f"{100 * probe / (PROBE_EVERY * whole / world):.1f} %" for world in (8, 64, 128)]
        pays = TOLERATED * PROBE_EVERY * whole / probe
        rows.append([name, f"{1e3 * whole / 8:.0f}", f"{probe:.1f}", *shares, f"{pays:.0f}"])
    return rows


WEAK = (
    "model",
    "GPUs",
    "TFLOP a step and GPU",
    "of which sidecars",
    "step, ms",
    "MB reduced, ours / full",
    "ours / full",
    "wire, ours",
    "wire, full",
    "probes on rank 0",
    "snapshots",
    "data, MB/s in all",
)
STRONG = ("model", "step on 8, ms", "a probe on one GPU, s", "waiting: 8 GPUs", "64", "128", "`all` pays from")


def share_of(file: Path) -> tuple[float, str]:
    """The share of the matrix-product rate that bench.py measured, of bfloat16 if there is one, and a word on it.

    Raises ValueError for a file that has none.
    """
    shares = {row.name: row.measured for row in read_figures(file)}
    for dtype in ("bfloat16", "float32"):
        share = shares.get(f"share of the {dtype} matrix-product rate")
        if isinstance(share, float):
            return share, f"measured by bench.py, {dtype} on a CPU"
    raise ValueError(f"{file}: expected a share of the matrix-product rate, as bench.py writes it, found none")


def show(title: str, columns: tuple[str, ...], rows: list[list[str]], as_markdown: bool) -> None:
    if as_markdown:
        print(f"\n{title}\n\n{markdown(columns, rows)}")
        return
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=312.0)
    parser.add_argument("--float32", type=float, default=156)
    reached = parser.add_mutually_exclusive_group()
    reached.add_argument("--efficiency", type=float, default=0.35)
    reached.add_argument("--measured", type=Path)
    parser.add_argument("--bus", type=float, default=25.0)
    parser.add_argument("--latency", type=float, default=30.0)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    share, source = arguments.efficiency, "assumed"
    if arguments.measured is not None:
        try:
            share, source = share_of(arguments.measured)
        except ValueError as error:
            parser.error(str(error))
    machine = Machine(arguments.peak, arguments.float32, share, arguments.bus, arguments.latency)
    peaks = f"{machine.peak:g} TFLOP/s, sidecars {machine.float32:g}; of these a share of {share:g}, {source}"
    assumed = f"{peaks}; bus {machine.bus:g} GB/s, {machine.latency:g} µs; nothing measured on a GPU"
    title = f"Weak scaling: {NEW} new and {REPLAY} replayed blocks a GPU ({assumed})"
    show(title, WEAK, weak(machine), arguments.markdown)
    title = (
        f"Strong scaling: {GLOBAL_NEW} new and {GLOBAL_REPLAY} replayed blocks in all; share of the time that all wait"
    )
    show(title, STRONG, strong(machine), arguments.markdown)


if __name__ == "__main__":
    main()
