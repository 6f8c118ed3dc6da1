"""Whether a run begins, goes on or is over: the folder that the config names, held against the config."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from revpatch.config import Config, ConfigError, SidecarConfig
from revpatch.config_file import dump_config, load_config
from revpatch.durable import write_atomically
from revpatch.ledger.events import RunEnded
from revpatch.ledger.history import JOURNAL_NAME, Ledger, PatchFile
from revpatch.ledger.journal import Journal
from revpatch.ledger.layers import SAME_MAP
from revpatch.ledger.restoring import events_of, is_restored, origin_of
from revpatch.ledger.run_lock import LOCK_NAME, lock_run
from revpatch.monitoring.terminal import log_to
from revpatch.monitoring.trackers import IDS_NAME
from revpatch.training.config_changes import compare_configs
from revpatch.training.going_on import check_history, check_nothing_made, how_anew
from revpatch.training.launcher_variables import launch_id
from revpatch.training.snapshot import Snapshot, newest_snapshot

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
class Standing:
    """Where a run stands."""

    directory: Path
    config: Config
    """As it was given."""
    begun: bool = False
    """It is there already."""
    snapshot: Snapshot | None = None
    """What it goes on from; None begins it anew."""
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


def stand(config: Config, fresh: bool, overwrite: bool) -> Standing:
    """Looks at the run's folder and claims it; for rank 0 alone. `fresh` is as in `begins_anew`.

    Raises:
        FileExistsError: the folder holds other things; or a run, and `fresh` asks for a new one without `overwrite`.
        ConfigError: the run there was begun with another config; another process writes to it; its snapshots are
            damaged or gone; or to go on would set aside a patch that a revert, merge or import has made since.
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
            "folder (--set output_dir=...), leave out --fresh to go on with it, or add --overwrite to delete it"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{named}: the folder can't be made ({error.strerror}, at {error.filename}): choose another one "
            "(--set output_dir=...), or give this user the right to make it"
        ) from error
    standing = Standing(directory, config, lock=claim(directory, named))
    if has_begun(config) and not is_run:
        raise ConfigError(
            f"{named}: another process has begun a run there since this one looked. Nothing was overwritten: give the "
            "command again to go on with that run, or choose another folder"
        )
    standing.origin = origin_of(directory)
    if standing.origin is not None:
        check_shape(standing.origin, config.sidecar)
    if is_run and fresh:
        for name in OUTPUTS:
            path = directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not is_run or fresh:
        if (launch := launch_id()) is not None:
            write_atomically(directory / LAUNCH_NAME, launch.encode())
        write_atomically(directory / CONFIG_NAME, dump_config(config).encode())
        log_to(directory / "train.log")
        return standing
    log_to(directory / "train.log")
    if asked:
        log.info("this very launch has begun the run, so in spite of --fresh it is gone on with")
    standing.begun = True
    standing.snapshot = newest_snapshot(directory / "snapshot", how_anew(directory, standing.origin))
    standing.changed = compare_configs(load_config(directory / CONFIG_NAME), config, standing.snapshot, named)
    check_history(directory, standing.origin, standing.snapshot)
    standing.over = _is_over(standing, config)
    if not standing.over:
        check_nothing_made(directory, standing.origin, standing.snapshot, named)
    return standing


def begins_anew(config: Config, fresh: bool) -> bool:
    """Whether `fresh` still asks for a new run: a launcher that starts its ranks again gives them the same options, and
    a run that this very launch has begun is the one that they asked for."""
    return fresh and not (has_begun(config) and _begun_by(config) == launch_id() is not None)


def _begun_by(config: Config) -> str | None:
    file = Path(config.output_dir) / LAUNCH_NAME
    return file.read_text(encoding="utf-8") if file.is_file() else None


def has_begun(config: Config) -> bool:
    """Whether there is a run in the folder that the config names."""
    return (Path(config.output_dir) / CONFIG_NAME).is_file()


def _is_over(standing: Standing, config: Config) -> bool:
    """Whether every phase of the config was committed, and the run's end put down after that."""
    snapshot = standing.snapshot
    if snapshot is None or snapshot.phase_index < len(config.phases):
        return False
    ends = Journal(standing.directory / "ledger" / JOURNAL_NAME).events(RunEnded)
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


def check_shape(origin: PatchFile, sidecar: SidecarConfig) -> None:
    """Raises ConfigError if the patch that a restored run begins with has other sidecars than the config."""
    then, now = origin.metadata["sidecar"], sidecar.model_dump(mode="json")
    if other := [key for key in (*SAME_MAP, "layers") if then.get(key) != now[key]]:
        wrong = ", ".join(f"sidecar.{key} = {then.get(key)!r}, not {now[key]!r}" for key in other)
        raise ConfigError(
            f"ledger/{origin.path.name} is a patch of another shape: it has {wrong}; set these in the config"
        )


def go_back(standing: Standing, ledger: Ledger, **fields: Any) -> None:
    """Brings ledger and replay to where the snapshot is; what came after it is set aside, and will be made again."""
    write_atomically(standing.directory / CONFIG_NAME, dump_config(standing.config).encode())
    snapshot, origin = standing.snapshot, standing.origin
    orphans = ledger.set_aside_orphans()
    events = snapshot.events if snapshot is not None else events_of(origin)
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
    ours = (LOCK_NAME, LAUNCH_NAME, f".{LAUNCH_NAME}.*.tmp", f".{CONFIG_NAME}.*.tmp", *(["ledger"] if restored else []))
    return not all(any(fnmatch(path.name, name) for name in ours) for path in directory.iterdir())


def _short(digests: list[str]) -> str:
    return ", ".join(f"{digest[:16]}…" for digest in digests)
