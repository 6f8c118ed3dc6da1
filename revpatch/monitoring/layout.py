"""What TensorBoard is told of a run before it begins: the page of its Custom Scalars tab, and its hyperparameters.

A mark is a series beside a probe's losses: at a commit, a rollback or a shard that is taken out it goes from the lowest
to the highest that the chart has shown within the last three steps, which draws a line that is as good as vertical.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from revpatch.config import Config

MARKS = ("commit", "rollback", "quarantine")
DRAWN_BESIDE = ("phase_start", "limit", "commit_limit", *MARKS)
"""The last words of the tags that are written as runs of their own: TensorBoard colours by run."""

Layout = dict[str, dict[str, tuple[str, list[str]]]]
"""Category, chart, and its kind with the patterns of its tags, as `SummaryWriter.add_custom_scalars` takes it."""


def layout_of(config: Config, peak: float | None) -> Layout:
    """The page for the probes and parts that this config has; `peak`: of a device, if it is known."""
    probes = [probe.name for probe in config.probes.sets]
    taught = [probe.name for probe in config.probes.sets if probe.guard_after is not None]
    forgetting = {
        f"{name}: loss, phase start, limits, marks": _lines(
            *(f"probe/{name}/{line}" for line in ("loss", "phase_start", "limit", "commit_limit")),
            *(f"mark/{name}/{mark}" for mark in MARKS),
        )
        for name in probes
    }
    costs = {
        "tokens a second": _lines("speed/tokens_per_second"),
        "seconds of each part of a step": _lines(
            *(f"time/{part}" for part in ("step", "waiting_for_data", "forward", "backward", "all_reduce", "optimizer"))
        ),
        "seconds of probes, snapshots, samples and log lines": _lines(
            *(f"time/{what}" for what in ("probe", "snapshot", "samples", "logging"))
        ),
        "memory of rank 0, 10⁹ bytes": _lines("memory/peak_gb"),
        "gradient bytes reduced a step": _lines("wire/bytes_a_step"),
        "share of the teacher's states found in its cache": _lines("teacher/cache_hit_rate"),
    }
    if peak is not None:
        costs["share of peak"] = _lines("speed/share_of_peak")
    return {
        "1. Is it learning?": {
            "training loss on new text, nats per token": _lines("loss/lm"),
            **({"held-out loss of the new corpora": _of_probes(taught, "loss")} if taught else {}),
            "the whole objective": _lines("loss/loss"),
        },
        **({"2. Is it forgetting?": forgetting} if forgetting else {}),
        "3. Is the patch small and local?": {
            **({"mean gate on each held-out set": _of_probes(probes, "gate")} if probes else {}),
            **({"share of tokens whose gate is below 0.1": _of_probes(probes, "sparsity")} if probes else {}),
            **({"patch norm on each held-out set": _of_probes(probes, "patch_norm")} if probes else {}),
            **{
                f"{name}: share of tokens whose gate is below 0.1, of each layer": _lines(
                    rf"sparsity_on_{name}/layer_\d+"
                )
                for name in probes
            },
            "mean gate of each layer": _lines(r"gate/layer_\d+"),
            "patch norm of each layer": _lines(r"patch_norm/layer_\d+"),
            "scale of each layer": _lines(r"scale/layer_\d+"),
        },
        "4. What does it cost?": costs,
    }


def hyperparameters(config: Config, facts: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """What tells one run from another: the knobs of the config by dotted name, and on what it runs."""
    found: dict[str, bool | int | float | str] = {"seed": config.seed}
    for section in ("sidecar", "teacher", "objective", "optimizer", "batch", "replay", "rollback", "engine"):
        for key, value in config.model_dump(mode="json")[section].items():
            found[f"{section}.{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    base = config.base
    found |= {"base.model": base.model, "base.dtype": base.dtype, "base.block_size": base.block_size}
    found["probes.every"] = config.probes.every
    found["phases"] = ", ".join(f"{phase.name} {phase.steps}" for phase in config.phases)
    return {**found, "ranks": facts["ranks"], "device": facts["device"]}


def _of_probes(names: Sequence[str], line: str) -> tuple[str, list[str]]:
    return _lines(*(f"probe/{name}/{line}" for name in names))


def _lines(*patterns: str) -> tuple[str, list[str]]:
    """A chart; TensorBoard matches its patterns from the start of a tag only."""
    return "Multiline", [f"^{pattern}$" for pattern in patterns]
