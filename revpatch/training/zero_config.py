"""DeepSpeed's JSON file: read, and refused where it asks for what the run's config decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from revpatch.config import ConfigError
from revpatch.config_file import read_text

_OURS = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "batch",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
}
_KNOWN = ("zero_optimization", "wall_clock_breakdown", "memory_breakdown", "comms_logger", "flops_profiler")
_PRECISIONS = ("fp16", "bf16", "amp", "torch_autocast")


def read_deepspeed_config(path: str | None) -> dict[str, Any]:
    """DeepSpeed's JSON, checked to ask for nothing that this trainer decides otherwise.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it isn't JSON, or asks for ZeRO 3, another optimizer or another precision.
    """
    if path is None:
        return {"zero_optimization": {"stage": 0}}
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"engine.deepspeed = {path}: no such file; see configs/deepspeed/ for examples")
    try:
        data = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"engine.deepspeed = {path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"engine.deepspeed = {path}: expected keys and values, found {type(data).__name__}")
    for key in ("zero_optimization", *_PRECISIONS):
        if not isinstance(data.get(key, {}), dict):
            raise ConfigError(f"{path}: {key} = {data[key]!r}: expected keys and values")
    zero = data.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage == 3:
        raise ConfigError(
            f"{path}: zero_optimization.stage = 3 partitions the model over the ranks, but here the frozen base is "
            "replicated and only the sidecars are trained: use stage 0, 1 or 2"
        )
    if type(stage) is not int or stage not in (0, 1, 2):
        raise ConfigError(f"{path}: zero_optimization.stage = {stage!r}: use 0, 1 or 2")
    if any(key.startswith("offload") and value for key, value in zero.items()):
        raise ConfigError(
            f"{path}: offloading is not supported: the sidecars' optimizer state is a few MB; leave it out"
        )
    for key, ours in _OURS.items():
        if key in data:
            raise ConfigError(f"{path}: {key} is set by {ours} in the run's config: take it out of this file")
    for key in _PRECISIONS:
        if data.get(key, {}).get("enabled"):
            raise ConfigError(
                f"{path}: {key} is enabled, but sidecars are trained in float32: take it out of this file"
            )
    unknown = sorted(data.keys() - {*_KNOWN, *_PRECISIONS})
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]} has no effect here or is misspelt; known are {', '.join(_KNOWN)}")
    checked: dict[str, Any] = data
    return checked
