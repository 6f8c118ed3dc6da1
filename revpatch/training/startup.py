"""What happens once, before the first step: the run's folder, the base, the table, an entry's identity."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from revpatch.config import BaseConfig, Config, ConfigError
from revpatch.config_file import dump_config
from revpatch.monitoring.terminal import console, log_to
from revpatch.patch.families import blocks_of, head_of
from revpatch.patch.patched_model import Patch, base_sha256
from revpatch.training.engine import Engine
from revpatch.training.launch import Peers

log = logging.getLogger("revpatch")

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def prepare_run(config: Config, peers: Peers) -> Path:
    """Makes the run's folder on rank 0 and starts its log; every rank gets the path.

    Raises:
        FileExistsError: the folder holds a run or other files; nothing is overwritten.
    """
    directory = Path(config.output_dir).absolute()
    refusal = None
    if peers.rank == 0:
        refusal = _claim(directory, config)
    refusal = peers.from_rank0(refusal)
    if refusal is not None:
        raise FileExistsError(refusal)
    return directory


def _claim(directory: Path, config: Config) -> str | None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        return (
            f"output_dir = {config.output_dir}: it exists and is no empty folder. Nothing was overwritten: choose "
            "another folder (--set output_dir=...), or move that one away"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        log_to(directory / "train.log")
    except OSError as error:
        return f"output_dir = {config.output_dir}: can't be written: {error}"
    return None


def load_base(config: BaseConfig, device: torch.device) -> nn.Module:
    """The frozen base on its device, in eval mode: dropout belongs neither in a teacher nor in a base.

    Raises:
        ConfigError: its weights are missing or broken, or its head is of a kind that is not supported.
    """
    try:
        base = AutoModelForCausalLM.from_pretrained(config.model, revision=config.revision, dtype=DTYPES[config.dtype])
        head_of(base)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"base.model = {config.model}: can't be loaded: {str(error).strip().splitlines()[0]}; check the folder's "
            "weights, or take the model from where it came again"
        ) from error
    return cast(nn.Module, base.to(device).eval().requires_grad_(False))


def compile_base(base: nn.Module) -> None:
    """Compiles every block of the base, in place."""
    for block in blocks_of(base):
        block.compile()


def facts(config: Config, base: nn.Module, patch: Patch, engine: Engine, peers: Peers) -> dict[str, Any]:
    """What the start-up table shows and the journal keeps."""
    trainable = sum(p.numel() for p in patch.parameters())
    frozen = sum(p.numel() for p in base.parameters())
    accumulation = config.batch.accumulation(peers.world)
    reductions = accumulation if engine.zero_stage == 2 else 1  # ZeRO 2 reduces in every micro-batch
    device = torch.cuda.get_device_name(peers.device) if peers.device.type == "cuda" else "cpu"
    zero = f", ZeRO {engine.zero_stage}" if engine.kind == "deepspeed" else ""
    return {
        "ranks": peers.world,
        "device": device,
        "backend": "nccl" if peers.device.type == "cuda" else "gloo",
        "engine": engine.kind + zero,
        "base": f"{config.base.model}, {config.base.dtype}",
        "trainable parameters": trainable,
        "frozen parameters": frozen,
        "gradient bytes reduced a step": 4 * trainable * reductions if peers.world > 1 else 0,
        "lanes": config.batch.new_blocks,
        "batch": f"{config.batch.new_blocks} new + {config.batch.replay_blocks} replayed blocks of "
        f"{config.base.block_size} tokens, in {accumulation} micro-batches a rank",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, python "
        f"{platform.python_version()}",
    }


def show(table_of: dict[str, Any]) -> None:
    """Prints the start-up table."""
    table = Table(title="revpatch", show_header=False, title_justify="left")
    for name, value in table_of.items():
        table.add_row(name, Text(f"{value:,}" if isinstance(value, int) else str(value)))  # a path may hold [ ]
    console.print(table)


def identity(config: Config, base: nn.Module, tokenizer: str) -> dict[str, Any]:
    """What an entry says of where it belongs; free of times, output paths and the number of ranks."""
    return {
        "base": {
            "model": config.base.model,
            "revision": config.base.revision,
            "sha256": base_sha256(base, rounded=True),
            "dtype": config.base.dtype,
        },
        "tokenizer": tokenizer,
        "sidecar": config.sidecar.model_dump(mode="json"),
        "seed": config.seed,
    }
