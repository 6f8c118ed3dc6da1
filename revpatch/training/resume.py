"""Whether a run begins, goes on or is over: the folder that the config names, held against the config."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from revpatch.config import Config, ConfigError, SidecarConfig
from revpatch.config_file import dump_config, load_config
from revpatch.durable import write_atomically
from revpatch.ledger.history import JOURNAL_NAME, Ledger, effective
from revpatch.ledger.journal import Journal
from revpatch.ledger.layers import SAME_MAP
from revpatch.ledger.restoring import Origin, is_restored, origin_of
from revpatch.ledger.run_lock import LOCK_NAME, lock_run
from revpatch.monitoring.terminal import log_to
from revpatch.training.snapshot import ANEW, Snapshot, newest_snapshot

CONFIG_NAME = "config.yaml"
OUTPUTS = ("train.log", "ledger", "replay", "snapshot", "tensorboard", "report.html", CONFIG_NAME)
"""What a run writes into its folder. The config comes first and goes last: it is what makes the folder a run's."""

MAY_CHANGE = (
    r"output_dir|monitoring\..*|snapshot\..*|ledger\..*|engine\..*|build\..*|teacher\..*|probes\.(every|placement)",
    r"stream\.(on_error|shard_cache|shard_cache_gb|retries)",
    r"base\.(model|compile|activation_checkpointing)|batch\.micro_blocks",  # a base has its sha256
    r"phases\.\d+\.steps",
    r"replay\.base|probes\.sets\.\d+\.shards|phases\.\d+\.shards(\.\d+\.shards)?",  # shards have their digests
)
"""Keys that may differ from those a run began with; what they name is held against hashes where there are any."""


@dataclass
class Standing:
    """Where a run stands."""

    directory: Path
    begun: bool = False
    """It is there already."""
    snapshot: Snapshot | None = None
    """What it goes on from; None begins it anew."""
    origin: Origin | None = None
    """The patch that it begins with, if it was restored from an entry of another run."""
    changed: dict[str, list[Any]] = field(default_factory=dict)
    """Config keys whose values are others than before: [old, new]."""
    lock: Any = None
    """The open file whose lock keeps other processes out of the folder."""

    @property
    def again(self) -> int | None:
        """The first step of the run that is written anew; None if none was written before."""
        if not self.begun:
            return None
        return 0 if self.snapshot is None else self.snapshot.step + 1


def stand(config: Config, fresh: bool, overwrite: bool) -> Standing:
    """Looks at the run's folder and claims it; for rank 0 alone.

    Raises:
        FileExistsError: the folder holds other things; or a run, and `fresh` asks for a new one without `overwrite`.
        ConfigError: the run there was begun with another config; another process writes to it; its snapshots are
            damaged or gone; or to go on would set aside a patch that a revert, merge or import has made since.
        EntryError, JournalError: the ledger there is damaged.
    """
    directory = Path(config.output_dir).absolute()
    named = f"output_dir = {config.output_dir}"
    is_run, restored = (directory / CONFIG_NAME).is_file(), is_restored(directory)
    if directory.exists() and not is_run and (not directory.is_dir() or _holds_anything(directory, restored)):
        raise FileExistsError(
            f"{named}: it exists, and is neither an empty folder nor a run. Nothing was overwritten: choose another "
            "folder (--set output_dir=...), or move that one away"
        )
    if is_run and fresh and not overwrite:
        raise FileExistsError(
            f"{named}: it holds a run, and --fresh would begin another there. Nothing was overwritten: choose another "
            "folder (--set output_dir=...), leave out --fresh to go on with it, or add --overwrite to delete it"
        )
    if restored and fresh:
        raise FileExistsError(
            f"{named}: it was made by `revpatch ledger restore`, and --fresh would begin without the patch that was "
            "restored. Nothing was overwritten: leave out --fresh, or choose another folder (--set output_dir=...)"
        )
    directory.mkdir(parents=True, exist_ok=True)
    standing = Standing(directory, lock=claim(directory, named))
    standing.origin = origin_of(directory)
    if standing.origin is not None:
        check_shape(standing.origin, config.sidecar)
    if is_run and fresh:
        for name in OUTPUTS:
            path = directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not is_run or fresh:
        write_atomically(directory / CONFIG_NAME, dump_config(config).encode())
        log_to(directory / "train.log")
        return standing
    log_to(directory / "train.log")
    standing.begun = True
    standing.snapshot = newest_snapshot(directory / "snapshot")
    standing.changed = compare_configs(load_config(directory / CONFIG_NAME), config, standing.snapshot, named)
    _check_history(standing)
    if not is_over(standing, config):
        _check_nothing_made(standing, named)
    return standing


def is_over(standing: Standing, config: Config) -> bool:
    """Whether every phase of the config was committed."""
    return standing.snapshot is not None and standing.snapshot.phase_index >= len(config.phases)


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


def check_shards(snapshot: Snapshot, digests: dict[str, list[str]]) -> None:
    """Holds the shards that are used from here on against those that were used before.

    Raises:
        ConfigError: a key names shards with other contents.
    """
    for key, expected in snapshot.digests.items():
        if key in digests and digests[key] != expected:
            raise ConfigError(
                f"{key}: these are not the shards that the run has trained with so far: expected digests "
                f"{_short(expected)}, found {_short(digests[key])}; name the shards that it began with"
            )


def check_identity(snapshot: Snapshot, identity: dict[str, Any]) -> None:
    """Holds base and tokenizer against those that the run was begun with.

    Raises:
        ConfigError: they are others; their names and folders may differ.
    """
    for what, before, after in (
        ("base.model: weights of sha256", snapshot.identity["base"]["sha256"], identity["base"]["sha256"]),
        ("base.model: a tokenizer of fingerprint", snapshot.identity["tokenizer"], identity["tokenizer"]),
    ):
        if before != after:
            raise ConfigError(
                f"{what} {before[:16]}… were used so far, and this one has {after[:16]}…: name the base that the run "
                "was begun with"
            )


def check_origin(origin: Origin, identity: dict[str, Any]) -> None:
    """Holds the patch that a restored run begins with against the base that is used.

    Raises:
        ConfigError: it is a patch of another family, base or tokenizer.
    """
    found, name = origin.metadata, f"ledger/{origin.name}"
    families = [of["base"].get("family") for of in (found, identity)]
    if all(families) and families[0] != families[1]:
        raise ConfigError(f"{name} is a patch of a {families[0]} model, and base.model is a {families[1]}")
    if (then := found["base"].get("sha256")) != (now := identity["base"]["sha256"]):
        raise ConfigError(
            f"{name} is a patch of {found['base'].get('model')}, weights of sha256 {str(then)[:16]}…, and base.model "
            f"has {now[:16]}…: name the base that it was trained on"
        )
    if found.get("tokenizer") not in (None, identity["tokenizer"]):  # what was saved from a model names none
        raise ConfigError(f"{name} was trained with another tokenizer than base.model has: name the right base")


def check_shape(origin: Origin, sidecar: SidecarConfig) -> None:
    """Raises ConfigError if the patch that a restored run begins with has other sidecars than the config."""
    then, now = origin.metadata["sidecar"], sidecar.model_dump(mode="json")
    if other := [key for key in (*SAME_MAP, "layers") if then.get(key) != now[key]]:
        wrong = ", ".join(f"sidecar.{key} = {then.get(key)!r}, not {now[key]!r}" for key in other)
        raise ConfigError(f"ledger/{origin.name} is a patch of another shape: it has {wrong}; set these in the config")


def go_back(standing: Standing, config: Config, ledger: Ledger, **fields: Any) -> None:
    """Brings ledger and replay to where the snapshot is; what came after it is set aside, and will be made again."""
    write_atomically(standing.directory / CONFIG_NAME, dump_config(config).encode())
    snapshot, origin = standing.snapshot, standing.origin
    orphans = ledger.set_aside_orphans()
    events = snapshot.events if snapshot is not None else 0 if origin is None else origin.events
    ledger.resume(
        events,
        snapshot=None if snapshot is None else snapshot.name,
        changed=standing.changed,
        orphans=orphans,
        **fields,
    )
    replay = standing.directory / "replay"
    for folder in sorted(replay.iterdir()) if replay.is_dir() else []:
        if snapshot is None or folder.name not in snapshot.replay:
            shutil.rmtree(folder)


def _check_history(standing: Standing) -> None:
    journal = Journal(standing.directory / "ledger" / JOURNAL_NAME)
    snapshot = standing.snapshot
    if snapshot is None and (past := next(filter(_needs_snapshot, effective(journal.records())), None)) is not None:
        raise ConfigError(
            f"{standing.directory}: expected a snapshot in snapshot/ to go on from, found none, and line "
            f"{past['seq'] + 1} of ledger/{JOURNAL_NAME} ({past['event']}) was written "
            f"after one: put that folder back, {ANEW}"
        )
    if snapshot is not None and journal.head_after(snapshot.events) != snapshot.head:
        raise ConfigError(
            f"{standing.directory}: snapshot {snapshot.name} was written after {snapshot.events} events of a journal "
            f"whose line {snapshot.events} has sha256 {snapshot.head[:16]}…, and ledger/{JOURNAL_NAME} is not that: "
            "put back the journal that belongs to it, or remove the snapshot to go on from an older one"
        )


def _check_nothing_made(standing: Standing, named: str) -> None:
    snapshot = standing.snapshot
    events = (0 if standing.origin is None else standing.origin.events) if snapshot is None else snapshot.events
    entries = Ledger(standing.directory / "ledger", readonly=True).entries()
    made = [entry for entry in entries if entry.seq >= events and "made_by" in entry.fields]
    if made:
        place = "its beginning" if snapshot is None else f"snapshot {snapshot.name}"
        reference = shlex.quote(f"{standing.directory}@{Path(made[-1].name).stem}")
        learned = ", ".join(entry.phase for entry in entries if entry.kind == "commit" and entry not in made)
        rest = f" without the phases that were committed here ({learned}) and their guard_after" if learned else ""
        raise ConfigError(
            f"{named}: training goes on from {place}, and would set aside {made[-1].name}, which was made since by a "
            f"revert, merge or import. To train on from it make a new run: `revpatch ledger restore {reference} "
            f"--as-new-run NEW`, then `revpatch train CONFIG --set output_dir=NEW`, with a CONFIG{rest}"
        )


def _needs_snapshot(event: dict[str, Any]) -> bool:
    """Whether a run has written a snapshot before this event, whatever happened."""
    return bool(event["event"] == "run_end" or (event["event"] == "phase_start" and event["phase_index"]))


def claim(directory: Path, named: str) -> Any:
    """Locks a run's folder until the file returned is closed. Raises ConfigError if another process holds it."""
    if (file := lock_run(directory)) is None:
        raise ConfigError(
            f"{named}: another process is writing to this folder (a training, or a revert, merge, import or prune): "
            "wait for it, stop it, or choose another folder"
        )
    return file


def _holds_anything(directory: Path, restored: bool) -> bool:
    """Whether there is more than what a run leaves that was killed before its config was written, or the ledger that
    a restored run begins with."""
    ours = (LOCK_NAME, f".{CONFIG_NAME}.*.tmp", *(["ledger"] if restored else []))
    return not all(any(fnmatch(path.name, name) for name in ours) for path in directory.iterdir())


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


def _short(digests: list[str]) -> str:
    return ", ".join(f"{digest[:16]}…" for digest in digests)
