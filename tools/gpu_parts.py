"""The parts of gpu_check.py that no other tool measures; each is run in a process of its own.

    python tools/gpu_parts.py PART --json FILE [--device cuda|cpu] [--compile]

FILE is written anew after each figure, so that a part that is ended leaves what it had. On a CPU the shapes are tiny
and the figures mean nothing: that is the dry run. Exits with 3, and a line, where a package is not there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from figures import Figure, machine, read_figures, write_figures

ROOT = Path(__file__).resolve().parent.parent
NOT_THERE = 3
"""The exit code of a part whose package is not installed."""
SIZES = {"cuda": ((8, 4), (16, 8), (32, 16)), "cpu": ((2, 1),)}
"""New and replayed blocks of a step, in one micro-batch: the larger, the fuller the GPU."""
READS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal")
"""Operations of aten that make the host wait for a GPU: they give it a value or a size."""
WAITED = "called a synchronizing"
"""How torch's warnings and errors about a wait begin."""
KERNELS = 14
"""Of a profiled step, the ones that take longest are listed."""


class Rows:
    """The figures of a part; each is on disk as soon as it is known."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.figures: list[Figure] = []

    def add(self, *figures: Figure) -> None:
        """Keeps the figures, in the place of earlier ones of their names, and shows them."""
        names = {figure.name for figure in figures}
        self.figures = [figure for figure in self.figures if figure.name not in names] + list(figures)
        write_figures(machine(), self.figures, self.file)
        for figure in figures:
            print(f"    {figure.name}: {figure.measured} {figure.unit}", file=sys.stderr, flush=True)


def look(rows: Rows, device: str, _: str | None) -> None:
    """The device itself: what it is, and its own rates, which are what a step is held against."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no NVIDIA GPU that it can use here")
    from bench_measure import rates, timed

    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        torch.zeros((), device=device)  # from here on figures.machine names the GPU
        rows.add(
            Figure.plain("GPU", about.name, ""),
            Figure.plain("compute capability", f"{about.major}.{about.minor}", ""),
            Figure.plain("memory", about.total_memory / 2**30, "GiB"),
            Figure.plain("CUDA of torch", str(torch.version.cuda), ""),
        )
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32} if device == "cuda" else {"float32": torch.float32}
    for name, dtype in dtypes.items():
        rows.add(Figure.plain(f"matrix products, {name}", rates(dtype, device) / 1e12, "TFLOP/s"))
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        rows.add(Figure.plain("matrix products, TF32", rates(torch.float32, device) / 1e12, "TFLOP/s"))
    source = torch.ones(2**30 if device == "cuda" else 2**22, device=device)
    copied = torch.empty_like(source)
    copied.copy_(source)
    seconds = timed(lambda: copied.copy_(source), device, 10)
    rows.add(Figure.plain("a copy, bytes read and written", 8 * source.numel() / seconds / 1e12, "TB/s"))


def workload_of(device: str, new: int, replay: int, backend: str | None = None, micro_blocks: int | None = None) -> Any:
    """GPT-2 124M in bfloat16 at 1,024 tokens a block, all in one micro-batch by default; on a CPU a tiny one."""
    import torch
    from bench_workload import Workload

    shape, block, dtype = ("gpt2", 1024, torch.bfloat16) if device == "cuda" else ("tiny", 32, torch.float32)
    return Workload(shape, new, replay, block, dtype, micro_blocks or new + replay, device, backend)


@contextlib.contextmanager
def ranks(device: str) -> Iterator[Any]:
    """A process group of this one rank, nccl on a GPU."""
    import torch

    from revpatch.distributed import Launch
    from revpatch.distributed.ranks import process_group

    launch = Launch.from_environment()
    place = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # as training does it on a bfloat16 base
    with process_group(launch, place, 5.0) as peers:
        yield peers


def engine_kinds() -> list[str]:
    """The engines whose packages are here, the config's default first."""
    import importlib.util

    return [kind for kind in ("deepspeed", "accelerate") if importlib.util.find_spec(kind) is not None]


def engine_kind() -> str:
    """The first of them; ModuleNotFoundError if there is none."""
    for kind in engine_kinds():
        return kind
    raise ModuleNotFoundError("No module named 'deepspeed', nor 'accelerate'", name="deepspeed")


def step(rows: Rows, device: str, backend: str | None) -> None:
    """Tokens a second of the trainer's own step, and its share of the device's peak, by counted operations."""
    import torch
    from bench_measure import flops_of, rates, timed
    from bench_ours import Ours, trainers_step

    from revpatch.train.startup import peak_tflops

    kind, best, best_share, fastest = engine_kind(), 0.0, 0.0, None
    peak = peak_tflops(torch.cuda.get_device_name()) if device == "cuda" else None
    peak = peak or rates(torch.bfloat16 if device == "cuda" else torch.float32, device) / 1e12
    rows.add(Figure.plain("peak that shares are of", peak, "TFLOP/s"), Figure.plain("engine", kind, ""))
    with ranks(device) as peers:
        for cached in (False, True):
            for new, replay in SIZES[device]:
                workload = workload_of(device, new, replay, backend)
                name = f"{new} + {replay} blocks{', all in the teacher’s cache' if cached else ''}"
                try:
                    ours = Ours(workload, cached=cached)
                    operations = flops_of(ours)
                    _, one = trainers_step(ours, kind, peers)
                    for _ in range(3):
                        one()
                    seconds = statistics.median(timed(one, device, 10 if device == "cuda" else 1) for _ in range(3))
                except torch.OutOfMemoryError as error:
                    rows.add(Figure.plain(f"tokens/s, {name}", f"out of memory: {str(error).splitlines()[0]}", ""))
                    break
                tokens, share = (new + replay) * workload.block / seconds, operations / seconds / peak / 1e12
                rows.add(
                    Figure.plain(f"tokens/s, {name}", tokens, "tokens/s"),
                    Figure.plain(f"share of peak, {name}", share, "of it"),
                )
                if not cached and tokens > best:
                    best, best_share, fastest = tokens, share, one
                    rows.add(*asked(best, best_share))  # of the sizes so far: a larger one may be ended
            if not best:
                rows.add(*asked(None, None))
        if fastest is not None:
            rows.add(*kernels(fastest, device))


def asked(tokens: float | None, share: float | None) -> list[Figure]:
    """What is asked of a step."""
    return [
        Figure.at_least("new + replayed tokens a second", 0.70e6, tokens, "tokens/s"),
        Figure.at_least("share of peak, by counted operations", 0.5, share, "of it"),
    ]


def kernels(one: Callable[[], object], device: str) -> list[Figure]:
    """Where a step's time goes on the GPU: its longest kernels, and the share of the time in which one runs."""
    import torch
    from bench_measure import timed
    from bench_workload import synchronize

    for _ in range(2):
        one()
    seconds = timed(one, device, 3)
    on_gpu = device == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as record:
        one()
        synchronize(device)
    which = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in record.key_averages() if getattr(event, which) > 0]
    events.sort(key=lambda event: -float(getattr(event, which)))
    total = sum(float(getattr(event, which)) for event in events) / 1e6
    return [
        Figure.plain("step, profiled: wall time without the profiler", 1e3 * seconds, "ms"),
        Figure.plain("step, profiled: time of all kernels / wall time", total / seconds, "of it"),
        Figure.plain("step, profiled: kernels", sum(event.count for event in events), "launches"),
        *(
            Figure.plain(f"kernel {event.key[:70]}, {event.count} times", float(getattr(event, which)) / 1e3, "ms")
            for event in events[:KERNELS]
        ),
    ]


def sync(rows: Rows, device: str, backend: str | None) -> None:
    """Whether one whole step of the trainer makes the host wait, after steps that made all state: its tokens on their
    way, forward, teacher, backward, clipping, optimizer and the sums of the log; with and without the cache."""
    from bench_ours import Ours, trainers_step

    found = 0
    with ranks(device) as peers:
        for kind in engine_kinds():
            for cached in (False, True):
                ours = Ours(workload_of(device, 4, 2, backend, micro_blocks=4), cached=cached)
                weights = {"stats_drift_weight": 0.1, "gate_l1_weight": 0.01, "patch_l2_weight": 0.01}
                ours.objective.config = ours.objective.config.model_copy(update=weights)
                engine, one = trainers_step(ours, kind, peers)
                for _ in range(3):
                    one()
                places = waits(one, device)
                found += len(places)
                name = f"{kind}{', with the teacher’s cache' if cached else ''}"
                rows.add(Figure.plain(f"waits in a step, {name}", "; ".join(places) or "none", ""))
            rows.add(*rolled_back(engine, one, ours.patch, peers, kind))
        rows.add(Figure.at_most("waits for the GPU in a step", 0, found, "waits"))


def rolled_back(engine: Any, one: Callable[[], object], patch: Any, peers: Any, kind: str) -> list[Figure]:
    """Whether a rollback gives back parameters, masters and moments to the bit; and whether steps after it repeat."""
    import torch

    from revpatch.train.rollback import restore_state, state_sha256

    good, names = engine.state(), []
    wanted = state_sha256(patch, good)
    for _ in range(2):
        for _ in range(3):
            one()
        names.append(state_sha256(patch, engine.state()))
        found = restore_state(engine, patch, good, peers)
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in patch.parameters())
    holds = found == wanted != names[0] and finite
    words = "the same bits" if holds else "other bits"
    again = "the same bits" if names[0] == names[1] else "other bits"
    return [
        Figure(f"after a rollback, {kind}", "the same bits", words, "", holds),
        Figure.plain(f"three steps, made twice, {kind}", again, ""),
    ]


def waits(one: Callable[[], object], device: str) -> list[str]:
    """Where a call makes the host wait for the device, a file and a line each; on a CPU the operations that would."""
    import torch
    from bench_workload import synchronize

    if device == "cpu":
        from torch.utils._python_dispatch import TorchDispatchMode

        class Counted(TorchDispatchMode):
            def __init__(self) -> None:
                super().__init__()
                self.found: list[str] = []

            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = str(function).removeprefix("aten.").split(".")[0]
                if name in READS:
                    self.found.append(f"aten::{name}")
                return function(*args, **(kwargs or {}))

        with Counted() as counted:
            one()
        operations: list[str] = counted.found
        return operations
    synchronize(device)
    try:
        with warnings.catch_warnings(record=True) as caught:  # all places, where an error would show the first alone
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            one()
        # Not the notice that this mode is a prototype, which tells of synchronizing too.
        found = [f"{Path(w.filename).name}:{w.lineno} {w.message}" for w in caught if WAITED in str(w.message)]
        if not found:
            torch.cuda.set_sync_debug_mode("error")
            one()
    except RuntimeError as error:
        if WAITED not in str(error):
            raise
        return [str(error).splitlines()[0]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return found


def memory(rows: Rows, device: str, backend: str | None) -> None:
    """The most that tensors take in a step: ours as its config has it by default, and the peers."""
    from bench_measure import peak_of

    new, replay = SIZES[device][0]
    found, others = {}, ("textbook-bf16", "ours-checkpointing", "lora-lm", "full-lm")
    for name in ("ours", "textbook-fp32", *(others if device == "cuda" else ())):
        found[name] = peak_of(name, workload_of(device, new, replay, backend, micro_blocks=4), 1)
        rows.add(Figure.plain(f"peak memory, {name}", found[name] / 2**20, "MiB"))
        if name == "textbook-fp32":
            share = found["ours"] / found[name]
            rows.add(Figure.at_most("peak memory, ours / textbook loop", 0.25, share, "of it"))
    if device == "cuda":
        whole = peak_of("ours", workload_of(device, new, replay, backend), 1)
        rows.add(Figure.plain("peak memory, ours in one micro-batch", whole / 2**20, "MiB"))


def nccl(rows: Rows, device: str, _: str | None) -> None:
    """The process group of one rank: what the trainer asks of it."""
    import torch

    with ranks(device) as peers:
        tensor = peers.mean_(torch.full((1000,), 3.0, device=device))
        said = peers.from_rank0({"verdict": 1}), peers.gather("here"), peers.agree(None, False)
        peers.barrier()
        works = bool((tensor == 3).all()) and said == ({"verdict": 1}, ["here"], ([], False))
        backend = str(torch.distributed.get_backend())
    rows.add(Figure(f"{'nccl' if device == 'cuda' else 'gloo'} with one rank", "works", backend, "", works))


def tests(rows: Rows, device: str, _: str | None) -> None:
    """tests/test_gpu.py: on a GPU the tests that are marked gpu, on a CPU the same ones there."""
    import pytest

    counts = {"passed": 0, "failed": 0}

    class Collector:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.failed:
                counts["failed" if report.failed else "passed"] += 1
                name = report.nodeid.rpartition("::")[2]
                words = str(report.longrepr).splitlines()[-1][:200] if report.failed else "passed"
                rows.add(Figure(f"test {name}", "passes", words, "", not report.failed))

    os.environ["DS_ACCELERATOR"] = device
    options = ["-q", "-p", "no:cacheprovider", *(["-m", "gpu"] if device == "cuda" else [])]
    with contextlib.redirect_stdout(sys.stderr):  # why nothing was run, if nothing was
        code = int(pytest.main([*options, str(ROOT / "tests/test_gpu.py")], plugins=[Collector()]))
    holds = code == 0 and counts["passed"] > 0
    rows.add(Figure("GPU tests that pass", "all", f"{counts['passed']}, {counts['failed']} fail", "", holds))


def demo(rows: Rows, device: str, _: str | None) -> None:
    """The demo's run and its figures; on a CPU a few steps of its first phase."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "demo"
        options = [f"output_dir='{run}'"]
        if (kind := engine_kind()) != "deepspeed":
            options.append(f"engine.kind={kind}")
        if device == "cpu":
            phase = {"name": "jargon", "shards": "shards/demo/jargon", "steps": 4}
            probe = {"name": "sotu", "shards": "shards/demo/sotu_probe", "max_blocks": 4}
            options += ["base.dtype=float32", "optimizer.warmup_steps=2", f"phases={json.dumps([phase])}"]
            options += [f"probes.sets={json.dumps([probe])}", "monitoring.samples.max_new_tokens=0"]
        chosen = [word for option in options for word in ("--set", option)]
        command = [sys.executable, "-m", "revpatch", "train", "configs/demo.yaml", *chosen]
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        rows.add(Figure("the demo's run", "ends with 0", str(done.returncode), "exit code", done.returncode == 0))
        log = (run / "train.log").read_text(encoding="utf-8") if (run / "train.log").is_file() else ""
        rows.add(*(Figure.plain("tokens/s, last log line", v, "") for v in re.findall(r"(\d+) tokens/s", log)[-1:]))
        if device == "cuda" and done.returncode == 0:
            file = Path(folder) / "demo.json"
            command = [sys.executable, str(ROOT / "tools/demo_figures.py"), str(run), "--json", str(file)]
            subprocess.run(command, stdout=sys.stderr, check=False)
            rows.add(*read_figures(file))


PARTS: dict[str, Callable[[Rows, str, str | None], None]] = {
    "machine": look,
    "step": step,
    "sync": sync,
    "memory": memory,
    "nccl": nccl,
    "tests": tests,
    "demo": demo,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--compile", action="store_true", help="as base.compile; on a CPU without making code")
    arguments = parser.parse_args()
    backend = None
    if arguments.compile:
        backend = "inductor" if arguments.device == "cuda" else "aot_eager"
    try:
        PARTS[arguments.part](Rows(arguments.json), arguments.device, backend)
    except ModuleNotFoundError as error:
        print(f"not there: {error.name}", file=sys.stderr)
        sys.exit(NOT_THERE)


if __name__ == "__main__":
    main()
