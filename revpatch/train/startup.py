"""What happens once, before the first step: the run's folder, the base, the table, an entry's identity, the cost."""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.table import Table
from rich.text import Text
from torch import nn

from revpatch.base import DTYPES, load_base
from revpatch.config import BaseConfig, Config, ConfigError, TeacherConfig
from revpatch.distributed.ranks import Ranks
from revpatch.patch.families import blocks_of, check_head, head_of
from revpatch.patch.patched_model import Patch, base_sha256
from revpatch.step.engine import Engine
from revpatch.step.frozen_base import with_own_code
from revpatch.step.teacher import TeacherCache
from revpatch.terminal import console
from revpatch.train.preflight import Plan
from revpatch.train.resume import RunStatus, run_status

PEAKS = {
    r"B200\b": 2250.0,
    r"H200(?! NVL)\b": 989.0,
    r"H100 PCIe": 756.0,
    r"H100 80GB HBM3": 989.0,
    r"A100\b": 312.0,
    r"L40S\b": 362.0,
    r"A10\b": 125.0,
    r"RTX 4090(?! D| Laptop)\b": 165.0,
    r"V100\b": 125.0,  # of float16: it has no bfloat16
}
"""Of CUDA devices by a pattern of their name: dense bfloat16, 10¹² operations a second, from NVIDIA's data sheets."""


def peak_tflops(device_name: str) -> float | None:
    """Peak of a CUDA device in bfloat16, 10¹² operations a second, by the name that torch gives it; None if unknown."""
    return next((peak for pattern, peak in PEAKS.items() if re.search(rf"\b{pattern}", device_name)), None)


def memory_in_use(device: torch.device) -> float:
    """Return bytes: on a GPU the most that tensors have taken since the last call, on a CPU what the process has
    resident."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(most)
    return float(resident_bytes())


def resident_bytes(peak: bool = False) -> int:
    """Return what this process has resident, in bytes; with `peak` the most that it has had."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    key = "VmHWM:" if peak else "VmRSS:"
    return 1024 * int(status.split(key)[1].split()[0])


def flops_a_token(base: nn.Module, patch: Patch) -> int:
    """Return floating-point operations of the student's matrix products for a token that is trained on.

    2 a base weight forward and 2 backward, as no gradient of a base weight is taken; 2 and 4 a sidecar weight. What
    attention takes over the context, the teacher and recomputation are not counted: a share of peak is a lower bound.
    """
    head = head_of(base).weight
    embeddings = {m.weight for m in base.modules() if isinstance(m, nn.Embedding)} - {head}
    products = sum(p.numel() for p in base.parameters() if p.dim() == 2 and p not in embeddings)
    return 4 * products + 6 * sum(p.numel() for p in patch.parameters() if p.dim() == 2)


log = logging.getLogger("revpatch")

FIRST_REPLAY = "first replay"
"""The fact that says where the shards of `replay.base` lie, those of the base's own text too."""


def prepare_run(config: Config, peers: Ranks, fresh: bool = False, overwrite: bool = False) -> RunStatus:
    """Claims the run's folder on rank 0 and finds out where the run stands; every rank is told, or gets the refusal.

    Raises:
        FileExistsError, ConfigError, OSError: see `stand`; nothing was overwritten.
    """
    status: RunStatus | None = None
    refusal: Exception | None = None
    if peers.rank == 0:
        try:
            status = run_status(config, fresh, overwrite)
        except (OSError, ValueError) as error:
            refusal = error
    refusal = peers.from_rank0(refusal)
    if refusal is not None:
        raise refusal
    told: RunStatus = peers.from_rank0(None if status is None else replace(status, lock=None))
    return status or told


def check_same_data(config: Config, plan: Plan, peers: Ranks) -> None:
    """Raises ConfigError if two ranks found other shards under one name, as on nodes with copies of their own."""
    found = peers.gather(
        [(key, plan.digests(config, phase)) for phase, key in enumerate(p.name for p in config.phases)]
    )
    for rank, other in enumerate(found):
        if other != found[0]:
            wrong = next(
                name
                for (_, here), (_, there) in zip(found[0], other, strict=True)
                for name in here
                if here[name] != there[name]
            )
            raise ConfigError(
                f"{wrong}: rank 0 and rank {rank} found different shards there (their manifests differ): give every "
                "node the same ones"
            )


class BaseWeights(NamedTuple):
    """The sha256 of a base's weights: `exact`, and `rounded` to bfloat16 as patches name their base."""

    exact: str
    rounded: str

    @classmethod
    def of(cls, base: nn.Module) -> BaseWeights:
        """Hash the base as it is held; once where both are the same."""
        exact = base_sha256(base)
        held = {parameter.dtype for parameter in base.parameters()}
        return cls(exact, exact if held == {torch.bfloat16} else base_sha256(base, rounded=True))


def load_same_base(config: BaseConfig, peers: Ranks) -> tuple[nn.Module, BaseWeights]:
    """Return the base on this rank's device, and the sha256 of what all ranks hold.

    Raises:
        ConfigError: on every rank: two ranks hold other weights, as on nodes with copies of their own; or on one of
            them it can't be loaded (see `load_base`).
    """
    base, weights, refusal = None, None, None
    try:
        base = load_frozen_base(config, peers.device)
        weights = BaseWeights.of(base)
    except ConfigError as error:
        refusal = error
    found = peers.gather((weights, None if refusal is None else str(refusal)))
    if refusal is not None:
        raise refusal
    held: dict[str, list[str]] = {}
    for rank, (other, words) in enumerate(found):
        if other is None:
            raise ConfigError(f"rank {rank} can't load the base: {words}")
        held.setdefault(other.exact, []).append(str(rank))
    if len(held) > 1:
        by = "; ".join(f"{sha256} on rank {', '.join(ranks)}" for sha256, ranks in held.items())
        raise ConfigError(
            f"base.model = {config.model}: the ranks hold different weights, of sha256 {by}: give every node the same "
            "files"
        )
    assert base is not None and weights is not None
    return base, weights


def load_frozen_base(config: BaseConfig, device: torch.device) -> nn.Module:
    """Return the frozen base on its device, in eval mode: dropout belongs neither in a teacher nor in a base.

    Raises:
        ConfigError: its weights are missing or broken, or its head is of a kind that is not supported.
    """
    try:
        base = load_base(config.model, config.revision, DTYPES[config.dtype])
    except (OSError, ValueError) as error:
        raise ConfigError(f"base.model = {config.model}: {error}") from error
    base = base.to(device).requires_grad_(False)
    try:
        check_head(base)
    except ValueError as error:
        raise ConfigError(f"base.model = {config.model}: {error}") from error
    return base


def choose_matmul_precision(config: Config, device: torch.device) -> None:
    """Let a GPU multiply float32 matrices in TF32 where the base is bfloat16: what sidecars are given is rounded to
    8 bits then, and TF32 keeps 11."""
    if device.type == "cuda" and config.base.dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")


def compile_base(base: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles every block of the base with its sidecar, in place."""
    for layer, block in enumerate(blocks_of(base)):
        block.forward = torch.compile(with_own_code(block.forward, f"block_{layer}"), backend=backend)


def teacher_cache(config: TeacherConfig) -> TeacherCache | None:
    """Return the cache that the config asks for, or None."""
    return TeacherCache(int(config.cache_gb * 1e9)) if config.cache_gb else None


def facts(config: Config, base: nn.Module, patch: Patch, engine: Engine, peers: Ranks) -> dict[str, Any]:
    """Return what the start-up table shows and the journal keeps; all ranks take part."""
    threads = sorted(peers.gather(torch.get_num_threads()))  # on CPUs the last bits depend on their number
    trainable = sum(p.numel() for p in patch.parameters())
    frozen = sum(p.numel() for p in base.parameters())
    accumulation = config.batch.accumulation(peers.world)
    device = torch.cuda.get_device_name(peers.device) if peers.device.type == "cuda" else "cpu"
    replayed = {FIRST_REPLAY: config.replay.base} if config.batch.replay_blocks else {}
    zero = f", ZeRO {engine.zero_stage}" if engine.kind == "deepspeed" else ""
    return {
        "ranks": peers.world,
        "threads a rank": threads[0] if threads[0] == threads[-1] else f"{threads[0]} to {threads[-1]}",
        "launcher": peers.launch.launcher,
        "device": device,
        "backend": "nccl" if peers.device.type == "cuda" else "gloo",
        "engine": engine.kind + zero,
        "base": f"{config.base.model}, {config.base.dtype}",
        "trainable parameters": trainable,
        "frozen parameters": frozen,
        "gradient bytes reduced a step": gradient_bytes(patch, engine, accumulation),
        "lanes": config.batch.new_blocks,
        "batch": f"{config.batch.new_blocks} new + {config.batch.replay_blocks} replayed blocks of "
        f"{config.base.block_size} tokens, in {accumulation} micro-batches a rank",
        **replayed,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, python "
        f"{platform.python_version()}",
    }


def peak_of(config: Config, device: torch.device) -> float | None:
    """Return the peak of this rank's device, 10¹² operations a second, for a bfloat16 base on a GPU that is known by
    its name; None shows no share of it."""
    if device.type != "cuda" or config.base.dtype != "bfloat16":
        return None
    return peak_tflops(torch.cuda.get_device_name(device))


def gradient_bytes(patch: Patch, engine: Engine, accumulation: int) -> int:
    """Return bytes of gradient that a rank hands to the others in an optimizer step."""
    reductions = accumulation if engine.zero_stage == 2 else 1  # ZeRO 2 reduces in every micro-batch
    return 4 * sum(p.numel() for p in patch.parameters()) * reductions if engine.world > 1 else 0


def show_table(table_of: dict[str, Any]) -> None:
    """Prints the start-up table."""
    table = Table(title="revpatch", show_header=False, title_justify="left")
    for name, value in table_of.items():
        table.add_row(name, Text(f"{value:,}" if isinstance(value, int) else str(value)))  # a path may hold [ ]
    console.print(table)


def identity(config: Config, base: nn.Module, weights: BaseWeights, tokenizer: str) -> dict[str, Any]:
    """Return what an entry says of where it belongs; free of times, output paths and the number of ranks."""
    family: str = base.config.model_type  # type: ignore[assignment, union-attr]
    return {
        "base": {
            "model": config.base.model,
            "family": family,
            "revision": config.base.revision,
            "sha256": weights.rounded,
            "dtype": config.base.dtype,
        },
        "tokenizer": tokenizer,
        "sidecar": config.sidecar.model_dump(mode="json"),
        "seed": config.seed,
    }
