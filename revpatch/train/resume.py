"""Whether a run is new, resumed or finished: its folder, journal and snapshots held against the config."""

from __future__ import annotations

import logging
import re
import shlex
import shutil
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from revpatch.config import SELF, Config, ConfigError, SidecarConfig
from revpatch.config.file import dump_config, load_config
from revpatch.distributed import launch_id
from revpatch.distributed.ranks import Ranks
from revpatch.durable import write_atomically
from revpatch.ledger.events import Event, PhaseBegun, RunEnded, RunResumed
from revpatch.ledger.inspect import SAME_MAP
from revpatch.ledger.journal import Journal
from revpatch.ledger.ledger import JOURNAL_NAME, LOCK_NAME, Ledger, PatchFile, effective, lock_run
from revpatch.ledger.maintenance import events_of, is_restored, origin_of
from revpatch.ledger.patch_file import EntryError
from revpatch.monitoring.trackers import IDS_NAME
from revpatch.terminal import log_to
from revpatch.train.snapshot import ANEW, Snapshot, newest_snapshot, snapshots_in

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


def check_same_config(config: Config, peers: Ranks) -> None:
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
    """Return the keys whose values differ, if all of them may.

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
            "Set these back to resume it, or choose another folder (--set output_dir=...). Steps may change in "
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


def how_anew(directory: Path, origin: PatchFile | None) -> str:
    """Return what to do where a run can't be resumed. One that was restored would lose its patch by --fresh."""
    if origin is None:
        return ANEW
    return (
        "or begin another run with the patch that this one began with: `revpatch ledger restore "
        f"{_reference(directory, origin.path.name)} --as-new-run NEW`, then train with --set output_dir=NEW"
    )


def check_history(directory: Path, origin: PatchFile | None, snapshot: Snapshot | None) -> None:
    """Raises ConfigError if a snapshot and the journal are of two histories, or a snapshot is missing."""
    journal = Journal(directory / "ledger" / JOURNAL_NAME)
    events = effective(journal.events(PhaseBegun, RunEnded, RunResumed))
    if snapshot is None and (past := next(filter(_needs_snapshot, events), None)) is not None:
        raise ConfigError(
            f"{directory}: expected a snapshot in snapshot/ to resume from, found none, and line "
            f"{past.seq + 1} of ledger/{JOURNAL_NAME} ({past.event}) was written "
            f"after one: put that folder back, {how_anew(directory, origin)}"
        )
    if snapshot is not None and not _fits(journal, snapshot):
        older = _older(directory, journal, snapshot)
        instead = how_anew(directory, origin)
        if older is not None:
            instead = f"or remove snapshot/{snapshot.name} to resume from {older.name}, {instead}"
        raise ConfigError(
            f"{directory}: snapshot {snapshot.name} was written after {snapshot.events} events of a journal "
            f"whose line {snapshot.events} has sha256 {snapshot.head[:16]}…, and ledger/{JOURNAL_NAME} is not that: "
            f"put back the journal that belongs to it, {instead}"
        )


def check_nothing_made(directory: Path, origin: PatchFile | None, snapshot: Snapshot | None, named: str) -> None:
    """Raises ConfigError if resuming would set aside a patch that was made since by other means than training."""
    made = _made_since(directory, events_of(origin) if snapshot is None else snapshot.events)
    if not made:
        return
    place = "its beginning" if snapshot is None else f"snapshot {snapshot.name}"
    entries = Ledger(directory / "ledger", readonly=True).entries()
    learned = ", ".join(entry.phase for entry in entries if entry.kind == "commit" and entry.name not in made)
    rest = f", without the phases that were committed here ({learned}) and their guard_after" if learned else ""
    raise ConfigError(
        f"{named}: training resumes from {place}, and would set aside {made[-1]}, which was made since by a revert, "
        "merge or import. To train on from it make a new run: `revpatch ledger restore "
        f"{_reference(directory, made[-1])} --as-new-run NEW`, then `revpatch train CONFIG --set output_dir=NEW`{rest}"
    )


def _reference(directory: Path, entry: str) -> str:
    """RUN@ENTRY, as it is typed."""
    return shlex.quote(f"{directory}@{Path(entry).stem}")


def _fits(journal: Journal, snapshot: Snapshot) -> bool:
    return journal.head_after(snapshot.events) == snapshot.head


def _older(directory: Path, journal: Journal, snapshot: Snapshot) -> Snapshot | None:
    """Return the snapshot that would be resumed from if this one were not there, if that would not be refused too."""
    for path in snapshots_in(directory / "snapshot"):
        if path.name >= snapshot.name:
            continue
        try:
            older = Snapshot.read(path)
        except EntryError:  # it would be passed over
            continue
        except ConfigError:
            return None
        return older if _fits(journal, older) and not _made_since(directory, older.events) else None
    return None


def _made_since(directory: Path, events: int) -> list[str]:
    """Return the entries after so many events that a revert, merge or import has made, the newest last."""
    entries = Ledger(directory / "ledger", readonly=True).entries()
    return [entry.name for entry in entries if entry.seq >= events and entry.made_by is not None]


def _needs_snapshot(event: Event) -> bool:
    """Return whether a run has written a snapshot before this event, whatever happened."""
    return isinstance(event, RunEnded) or (isinstance(event, PhaseBegun) and event.phase_index > 0)


log = logging.getLogger("revpatch")

CONFIG_NAME = "config.yaml"
LAUNCH_NAME = ".launch"
OUTPUTS = (
    "train.log",
    "ledger",
    "replay",
    "snapshot",
    "tensorboard",
    IDS_NAME,
    "report.html",
    LAUNCH_NAME,
    CONFIG_NAME,
)
"""What a run writes into its folder. The config comes first and goes last: it is what makes the folder a run's."""


@dataclass
class RunStatus:
    """Where a run stands."""

    directory: Path
    config: Config
    """As it was given."""
    begun: bool = False
    """It is there already."""
    snapshot: Snapshot | None = None
    """What it resumes from; None begins it anew."""
    over: bool = False
    """There is nothing left to do."""
    origin: PatchFile | None = None
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


def run_status(config: Config, fresh: bool, overwrite: bool) -> RunStatus:
    """Looks at the run's folder and claims it; for rank 0 alone. `fresh` is as in `begins_anew`.

    Raises:
        FileExistsError: the folder holds other things; or a run, and `fresh` asks for a new one without `overwrite`.
        ConfigError: the run there was begun with another config; another process writes to it; its snapshots are
            damaged or gone; or resuming would set aside a patch that a revert, merge or import has made since.
        EntryError, JournalError: the ledger there is damaged.
    """
    directory = Path(config.output_dir).absolute()
    named = f"output_dir = {config.output_dir}"
    is_run, restored = has_begun(config), is_restored(directory)
    if directory.exists() and not is_run and (not directory.is_dir() or _holds_anything(directory, restored)):
        raise FileExistsError(
            f"{named}: it exists, and is neither an empty folder nor a run. Nothing was overwritten: choose another "
            "folder (--set output_dir=...), or move that one away"
        )
    if restored and fresh:
        raise FileExistsError(
            f"{named}: it was made by `revpatch ledger restore`, and --fresh would begin without the patch that was "
            "restored. Nothing was overwritten: leave out --fresh, or choose another folder (--set output_dir=...)"
        )
    asked, fresh = fresh, begins_anew(config, fresh)
    if is_run and fresh and not overwrite:
        raise FileExistsError(
            f"{named}: it holds a run, and --fresh would begin another there. Nothing was overwritten: choose another "
            "folder (--set output_dir=...), leave out --fresh to resume it, or add --overwrite to delete it"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{named}: the folder can't be made ({error.strerror}, at {error.filename}): choose another one "
            "(--set output_dir=...), or give this user the right to make it"
        ) from error
    status = RunStatus(directory, config, lock=claim(directory, named))
    if has_begun(config) and not is_run:
        raise ConfigError(
            f"{named}: another process has begun a run there since this one looked. Nothing was overwritten: give the "
            "command again to resume that run, or choose another folder"
        )
    status.origin = origin_of(directory)
    if status.origin is not None:
        check_shape(status.origin, config.sidecar)
    if is_run and fresh:
        for name in OUTPUTS:
            path = directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not is_run or fresh:
        if (launch := launch_id()) is not None:
            write_atomically(directory / LAUNCH_NAME, launch.encode())
        write_atomically(directory / CONFIG_NAME, dump_config(config).encode())
        log_to(directory / "train.log")
        return status
    log_to(directory / "train.log")
    if asked:
        log.info("this very launch has begun the run, so in spite of --fresh it is resumed")
    status.begun = True
    status.snapshot = newest_snapshot(directory / "snapshot", how_anew(directory, status.origin))
    status.changed = compare_configs(load_config(directory / CONFIG_NAME), config, status.snapshot, named)
    check_history(directory, status.origin, status.snapshot)
    status.over = _is_over(status, config)
    if not status.over:
        check_nothing_made(directory, status.origin, status.snapshot, named)
    return status


def begins_anew(config: Config, fresh: bool) -> bool:
    """Return whether `fresh` still asks for a new run: a launcher that starts its ranks again gives them the same
    options, and a run that this very launch has begun is the one that they asked for."""
    return fresh and not (has_begun(config) and _begun_by(config) == launch_id() is not None)


def _begun_by(config: Config) -> str | None:
    file = Path(config.output_dir) / LAUNCH_NAME
    return file.read_text(encoding="utf-8") if file.is_file() else None


def has_begun(config: Config) -> bool:
    """Return whether there is a run in the folder that the config names."""
    return (Path(config.output_dir) / CONFIG_NAME).is_file()


def _is_over(status: RunStatus, config: Config) -> bool:
    """Return whether every phase of the config was committed, and the run's end recorded after that."""
    snapshot = status.snapshot
    if snapshot is None or snapshot.phase_index < len(config.phases):
        return False
    ends = Journal(status.directory / "ledger" / JOURNAL_NAME).events(RunEnded)
    return any(end.seq >= snapshot.events for end in ends)


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


def check_origin(origin: PatchFile, identity: dict[str, Any]) -> None:
    """Holds the patch that a restored run begins with against the base that is used.

    Raises:
        ConfigError: it is a patch of another family, base or tokenizer.
    """
    found, name = origin.metadata, f"ledger/{origin.path.name}"
    families = [side["base"].get("family") for side in (found, identity)]
    if all(families) and families[0] != families[1]:
        raise ConfigError(f"{name} is a patch of a {families[0]} model, and base.model is a {families[1]}")
    if (then := found["base"].get("sha256")) != (now := identity["base"]["sha256"]):
        raise ConfigError(
            f"{name} is a patch of {found['base'].get('model')}, weights of sha256 {str(then)[:16]}…, and base.model "
            f"has {now[:16]}…: name the base that it was trained on"
        )
    if found.get("tokenizer") not in (None, identity["tokenizer"]):  # what was saved from a model names none
        raise ConfigError(f"{name} was trained with another tokenizer than base.model has: name the right base")


def check_shape(origin: PatchFile, sidecar: SidecarConfig) -> None:
    """Raises ConfigError if the patch that a restored run begins with has other sidecars than the config."""
    then, now = origin.metadata["sidecar"], sidecar.model_dump(mode="json")
    if other := [key for key in (*SAME_MAP, "layers") if then.get(key) != now[key]]:
        wrong = ", ".join(f"sidecar.{key} = {then.get(key)!r}, not {now[key]!r}" for key in other)
        raise ConfigError(
            f"ledger/{origin.path.name} is a patch of another shape: it has {wrong}; set these in the config"
        )


def go_back(status: RunStatus, ledger: Ledger, **fields: Any) -> None:
    """Brings ledger and replay to where the snapshot is; what came after it is set aside, and will be made again."""
    write_atomically(status.directory / CONFIG_NAME, dump_config(status.config).encode())
    snapshot, origin = status.snapshot, status.origin
    orphans = ledger.set_aside_orphans()
    events = snapshot.events if snapshot is not None else events_of(origin)
    ledger.resume(
        events,
        snapshot=None if snapshot is None else snapshot.name,
        changed=status.changed,
        orphans=orphans,
        **fields,
    )
    replay = status.directory / "replay"
    for folder in sorted(replay.iterdir()) if replay.is_dir() else []:
        if snapshot is None or folder.name not in snapshot.replay:
            shutil.rmtree(folder)


def claim(directory: Path, named: str) -> Any:
    """Locks a run's folder until the file returned is closed. Raises ConfigError if another process holds it."""
    if (file := lock_run(directory)) is None:
        raise ConfigError(
            f"{named}: another process is writing to this folder (a training, or a revert, merge, import or prune): "
            "wait for it, stop it, or choose another folder"
        )
    return file


def _holds_anything(directory: Path, restored: bool) -> bool:
    """Return whether there is more than what a run leaves that was killed before its config was written, or the ledger
    that a restored run begins with."""
    ours = (LOCK_NAME, LAUNCH_NAME, f".{LAUNCH_NAME}.*.tmp", f".{CONFIG_NAME}.*.tmp", *(["ledger"] if restored else []))
    return not all(any(fnmatch(path.name, name) for name in ours) for path in directory.iterdir())


def _short(digests: list[str]) -> str:
    return ", ".join(f"{digest[:16]}…" for digest in digests)
