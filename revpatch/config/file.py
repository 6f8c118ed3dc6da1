"""Configs in and out of files: YAML or JSON, `--set section.key=value` over it, errors explained; DeepSpeed's JSON."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from revpatch.config import Config, ConfigError

_PATHS = ("output_dir", "model", "shards", "base", "deepspeed")
"""Keys that name files and folders."""


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML or JSON config and applies `section.key=value` overrides, whose values are read as YAML.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it isn't YAML or JSON, or doesn't make a valid config.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"config {path}: no such file; pass the path of a YAML or JSON config, e.g. configs/demo.yaml"
        )
    try:
        text = read_config_text(path)
        if path.suffix == ".json":
            data = json.loads(text, object_pairs_hook=_without_duplicates)
        else:
            data = yaml.load(text, Loader=_Loader)  # noqa: S506
    except RecursionError:
        raise ConfigError(f"config {path}: its lists or sections are nested too deeply to be a config") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"config {path}: can't be read as {path.suffix[1:] or 'YAML'}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"config {path}: expected keys and values, found {type(data).__name__}")
    for override in overrides or []:
        _apply_override(data, override)
    try:
        return Config.model_validate(_with_home(data))
    except ValidationError as error:
        raise ConfigError(_explain(path, error)) from None


def read_config_text(path: Path) -> str:
    """Return the text of a file that a person has written: UTF-8, or UTF-16 with its mark, as editors on Windows write
    it; the mark is left out. Raises OSError, and ValueError that names the byte that is neither."""
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, name = "utf-16", "UTF-16, which its mark says it is"
    else:
        encoding, name = "utf-8-sig", "UTF-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"byte {error.start} (line {line}, {data[error.start : error.start + 1]!r}) is not {name}: save the file "
            "as UTF-8"
        ) from error


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML that `load_config` reads back to an equal one."""
    plain = config.model_dump(mode="json")
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_E = re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """YAML in which numbers are what people expect, and a key given twice is an error.

    1e-3 is a number (YAML 1.1 asks for 1.0e-3); 010 is none (there it is 8), nor is 1:30 (there it is 90).
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that `_Loader`, or YAML 1.1, would take for a number."""


_STARTS = list("-+.0123456789")
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), _STARTS)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$"),
    _STARTS,
)
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(_FLOAT, _E, _STARTS)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key {key!r} is given twice")
    return dict(pairs)


def _with_home(value: Any, key: str = "") -> Any:
    """Return the config with `~/` at the beginning of a path spelled out, as no shell does it inside a file: a folder
    named `~` is what nobody asked for. (The cache of `stream` is spelled out where it is used.)"""
    if isinstance(value, dict):
        return {key: _with_home(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_home(each) for each in value]
    if isinstance(value, str) and value.startswith("~/") and key in _PATHS:
        try:
            return str(Path(value).expanduser())
        except RuntimeError:
            raise ConfigError(
                f"{value}: there is no home folder for ~ (HOME is not set): give the whole path"
            ) from None
    return value


def _apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one dotted key; list items are named by their number (`phases.0.steps=10`)."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected section.key=value, e.g. --set optimizer.lr=1e-3")
    if " #" in value and value.strip()[:1] not in ("'", '"'):
        raise ConfigError(f"--set {override!r}: YAML reads what follows ' #' as a comment: put the value in quotes")
    *parents, last = key.strip().split(".")
    target: Any = data
    for part in parents:
        if isinstance(target, list):
            target = target[_item(target, part, override)]
        elif isinstance(target, dict):
            if target.get(part) is None:  # a section that is absent, or there without a key
                target[part] = {}
            target = target[part]
        else:
            raise ConfigError(f"--set {override!r}: {part!r} lies under a single value; give a whole key")
    try:
        parsed = yaml.load(value, Loader=_Loader)  # noqa: S506
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error
    if isinstance(target, list):
        target[_item(target, last, override)] = parsed
    elif isinstance(target, dict):
        target[last] = parsed
    else:
        raise ConfigError(f"--set {override!r}: {last!r} lies under a single value; give a whole key")


def _item(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        advice = f"use 0 to {len(items) - 1}" if items else "the list is empty, so give the whole of it"
        raise ConfigError(f"--set {override!r}: {part!r} is no item of a list of {len(items)}; {advice}")
    return int(part)


_GONE = (
    *("optimizer.gate_lr_factor", "optimizer.eps", "teacher.spill", "teacher.spill_gb", "stream.retries", "ledger"),
    *("build.workers", "engine.tf32", "monitoring.peak_tflops", "snapshot.keep"),
)
"""Keys of revpatch 0.1, which the config.yaml of its runs has."""


def _explain(path: Path, error: ValidationError) -> str:
    lines = [f"config {path}: {error.error_count()} mistake(s)"]
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(the whole)"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            gone = "no such key since revpatch 0.2; remove it (a run of 0.1 is read by 0.1: pip install revpatch==0.1)"
            message = gone if key in _GONE else "no such key; remove it or mend its spelling"
        elif item["type"] == "missing":
            message = "is missing; add it"
        elif not isinstance(item["input"], dict):
            message += f"; found {item['input']!r} ({type(item['input']).__name__})"
            if item["type"] == "string_type" and item["input"] is not None and not isinstance(item["input"], list):
                message += "; put it in quotes"
        lines.append(f"  {key}: {message}")
    return "\n".join(lines)


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
        data = json.loads(read_config_text(file))
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
