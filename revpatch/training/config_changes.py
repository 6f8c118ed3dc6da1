"""What may differ between two configs: of a run and of what goes on with it, and of the ranks of one run."""

from __future__ import annotations

import re
from typing import Any

from revpatch.config import SELF, Config, ConfigError
from revpatch.training.launch import Peers
from revpatch.training.snapshot import Snapshot

MAY_CHANGE = (
    r"output_dir|monitoring\..*|snapshot\..*|engine\..*|build\..*|teacher\..*|probes\.(every|placement)",
    r"stream\.(on_error|shard_cache|shard_cache_gb)",
    r"base\.(model|compile|activation_checkpointing)|batch\.micro_blocks",  # a base has its sha256
    r"phases\.\d+\.steps",
    r"replay\.base|probes\.sets\.\d+\.shards|phases\.\d+\.shards(\.\d+\.shards)?",  # shards have their digests
)
"""Keys that may differ from those a run began with; what they name is held against hashes where there are any."""
PLACES = (
    r"output_dir|base\.model|replay\.base|probes\.sets\.\d+\.shards|phases\.\d+\.shards(\.\d+\.shards)?|"
    r"stream\.shard_cache|build\.folder|engine\.deepspeed"
)
"""Keys that name places, which may lie elsewhere on another node."""


def check_same_config(config: Config, peers: Peers) -> None:
    """Raises ConfigError, on all ranks, if a rank was started with another config: nodes with files of their own."""
    flat = _flat(config.model_dump(mode="json"))
    found = peers.gather({key: value for key, value in flat.items() if _counts(key, value)})
    for rank, other in enumerate(found):
        if wrong := [key for key in {**found[0], **other} if found[0].get(key) != other.get(key)]:
            lines = [f"  {key}: {found[0].get(key)!r} on rank 0, {other.get(key)!r} on rank {rank}" for key in wrong]
            raise ConfigError(
                "two ranks were started with different configs, which differ in\n" + "\n".join(lines) + "\n"
                "Give every node the same file and the same options"
            )


def _counts(key: str, value: Any) -> bool:
    return re.fullmatch(PLACES, key) is None or (key, value) == ("replay.base", SELF)


def compare_configs(old: Config, new: Config, snapshot: Snapshot | None, named: str) -> dict[str, list[Any]]:
    """The keys whose values differ, if all of them may.

    Raises:
        ConfigError: the differing keys that may not.
    """
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    known = len(old.phases)
    appended = [key for key in after if key not in before and (found := _phase_of(key)) is not None and found >= known]
    changed = {
        key: [before.get(key), after.get(key)]
        for key in {**before, **after}
        if before.get(key) != after.get(key) and key not in appended
    }
    wrong = [key for key in changed if not any(re.fullmatch(pattern, key) for pattern in MAY_CHANGE)]
    if SELF in changed.get("replay.base", []):  # no place: what the base writes is a probe set too
        wrong.append("replay.base")
    for index, phase in enumerate(new.phases):
        key = f"phases.{index}.steps"
        if snapshot is None or key not in changed:
            continue
        made = snapshot.phase.step if snapshot.phase is not None and index == snapshot.phase_index else 0
        if index < snapshot.phase_index or phase.steps < made:
            wrong.append(key)
    if wrong:
        lines = [f"  {key}: {changed[key][0]!r} then, {changed[key][1]!r} now" for key in wrong]
        raise ConfigError(
            f"{named} holds a run that was begun with another config, which differs in\n" + "\n".join(lines) + "\n"
            "Set these back to go on with it, or choose another folder (--set output_dir=...). Steps may change in "
            "phases that are not committed, and not below what was trained; phases may be added at the end"
        )
    return changed


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys and list items by their dotted names."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, inner in items
        for key, leaf in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _phase_of(key: str) -> int | None:
    found = re.match(r"phases\.(\d+)\.", key)
    return int(found[1]) if found else None
