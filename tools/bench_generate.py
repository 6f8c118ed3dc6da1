"""What a patch costs when text is written, beside what is asked.

    python tools/bench_generate.py [--json FILE] [--rounds 9] [--tokens 64] [--threads 2] [--device cpu|cuda]
                                   [--dtype float32|bfloat16] [--bases demo,gpt2]

On a random model of GPT-2's shape (124M) and on the demo's base, with a patch of r = 64 whose weights are as large as
training makes them, it measures:

- tokens/s of greedy `generate` with a cache, the gate learned over the gate off, in turn within each round; median of
  the rounds' ratios. On a machine with other work a round is disturbed as a whole, so the ratio is what holds;
- on a GPU the kernels that are launched for a token, which is what one sequence at a time waits for; on a CPU the
  operations of torch, by torch's profiler: those of twice as many tokens less those of so many;
- the time of switching between two loaded patches, and the memory that switching allocates;
- the size of a patch file and of the model, of GPT-2's shape.

Prints a table and exits with 1 if a figure does not hold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_workload import synchronize
from figures import Figure, machine, show, write_figures
from progress import Progress
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import revpatch
from revpatch.terminal import quiet_libraries

DEMO_BASE = Path(__file__).resolve().parent.parent / "shards/demo_base"
PROMPT_TOKENS = 32
SWITCHES = 1000
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
"""As the profiler names what starts work on a GPU."""
SPEED, COUNT, SWITCHING = "a round of generate", "counting what a token takes", "switching"


BASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "demo": ("the demo's base", lambda: AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32)),
    "gpt2": ("GPT-2's shape", lambda: GPT2LMHeadModel(GPT2Config())),
}


def trained(patch: nn.Module) -> None:
    """Fills the last layers, which are zero at the start, and moves the gates off one half."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter))


def write(model: Any, tokens: int) -> None:
    """One greedy text of so many tokens."""
    ids = torch.arange(3, 3 + PROMPT_TOKENS, device=model.device)[None]
    knobs = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **knobs)


def tokens_per_second(model: Any, tokens: int) -> float:
    synchronize(model.device.type)
    start = time.perf_counter()
    write(model, tokens)
    synchronize(model.device.type)
    return tokens / (time.perf_counter() - start)


def launches(model: Any, tokens: int) -> int:
    """What the device is given to do while so many tokens are written: kernels of a GPU, operations on a CPU."""
    on_gpu = model.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=kinds) as record:
        write(model, tokens)
        synchronize(model.device.type)
    events = record.key_averages()
    return sum(event.count for event in events if (event.key in LAUNCHES if on_gpu else event.key[:6] == "aten::"))


def launches_a_token(model: Any, what: str, tokens: int) -> list[Figure]:
    """With the patch and without."""
    rows, unit = [], "launches" if model.device.type == "cuda" else "operations"
    for mode, words in (("learned", "with the patch"), ("off", "without")):
        revpatch.set_gate(model, mode)  # type: ignore[arg-type]
        each = (launches(model, 2 * tokens) - launches(model, tokens)) / tokens
        rows.append(Figure.plain(f"{unit} a token {words}, {what}", each, unit))
    return rows


def speed(model: Any, what: str, tokens: int, rounds: int, progress: Progress) -> list[Figure]:
    """Learned over off; both go first in every other round."""
    rates: dict[str, list[float]] = {"off": [], "learned": []}
    for number in range(rounds + 1):
        modes = ("off", "learned") if number % 2 else ("learned", "off")
        with progress.step(SPEED):
            for mode in modes:
                revpatch.set_gate(model, mode)  # type: ignore[arg-type]
                rate = tokens_per_second(model, tokens)
                if number:  # the first round warms up
                    rates[mode].append(rate)
    ratio = statistics.median(learned / off for learned, off in zip(rates["learned"], rates["off"], strict=True))
    return [
        Figure.at_least(f"tokens/s with the patch / without, {what}", 0.9, ratio, "ratio"),
        Figure.plain(f"tokens/s with the patch, {what}", statistics.median(rates["learned"]), "tokens/s"),
        Figure.plain(f"tokens/s without, {what}", statistics.median(rates["off"]), "tokens/s"),
    ]


def switching(model: nn.Module) -> list[Figure]:
    """Between two patches; what is allocated is counted over all switches."""
    revpatch.add_patch(model, revpatch.SidecarConfig(), "other")
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with torch.profiler.profile(profile_memory=True) as record:
        start = time.perf_counter()
        for _ in range(SWITCHES):
            revpatch.set_patch(model, "other")
            revpatch.set_patch(model, "default")
        micros = (time.perf_counter() - start) / (2 * SWITCHES) * 1e6
    kinds = ("self_cpu_memory_usage", "self_device_memory_usage")
    copied = sum(max(getattr(event, kind), 0) for event in record.key_averages() for kind in kinds)
    stayed = places == [parameter.data_ptr() for parameter in model.parameters()]
    assert stayed, "the base was moved"
    revpatch.remove_patch(model, "other")
    return [
        Figure.at_most("switching between two loaded patches", 1000, micros, "microseconds"),
        Figure.at_most("bytes of tensors allocated by switching", 0, copied, "bytes"),
    ]


def sizes(model: Any) -> Figure:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "patch.safetensors"
        revpatch.save_patch(model, file)
        patch = file.stat().st_size / 1e6
    base = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e6
    what = f"patch file, GPT-2's shape, r = 64, against {base:.0f} MB of model"
    return Figure.at_most(what, 5, patch, "MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    parser.add_argument("--bases", default=",".join(BASES), help=f"of {', '.join(BASES)}")
    args = parser.parse_args()
    bases = args.bases.split(",")
    if not set(bases) <= BASES.keys():
        parser.error(f"--bases {args.bases}: choose from {', '.join(BASES)}")
    quiet_libraries()
    torch.set_num_threads(args.threads)
    steps = [*[SPEED] * (args.rounds + 1), COUNT] * len(bases)
    rows, progress = [], Progress("bench_generate.py", [*steps, SWITCHING])
    title = f"writing text, {args.dtype} base on {args.device}, {args.threads} threads\n{machine('transformers')}"
    for base in bases:
        torch.manual_seed(0)
        what, make = BASES[base]
        model = make().to(args.device, getattr(torch, args.dtype)).eval()
        trained(revpatch.attach(model, revpatch.SidecarConfig()))
        rows += speed(model, what, args.tokens, args.rounds, progress)
        with progress.step(COUNT):
            rows += launches_a_token(model, what, args.tokens)
        if args.json is not None:
            write_figures(title, rows, args.json)  # what follows may be ended
    revpatch.set_gate(model, "learned")
    with progress.step(SWITCHING):
        rows += switching(model)
    if base == "gpt2":
        rows.append(sizes(model))
    show(title, rows, args.json)
    sys.exit(not all(row.holds for row in rows))


if __name__ == "__main__":
    main()
