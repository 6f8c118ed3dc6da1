"""Raw sources in a config: their shards are built on first use by rank 0, while the others wait.

    data/built/mine-jsonl-3f1c9a40b2de           the shards of mine.jsonl, as that base and `build` make them
    data/built/mine-jsonl-3f1c9a40b2de_probe     its held-out side, where a probe set names mine.jsonl too

The folder's name has a hash of all that decides what is in it, so a changed file or option is built anew beside it.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

from revpatch.config import Config, ConfigError
from revpatch.corpus.build import build_shards
from revpatch.corpus.chunks import BadDocumentError
from revpatch.corpus.progress import shown_progress
from revpatch.corpus.sources import find_inputs, is_raw_source, name_of_source
from revpatch.corpus.tokenizer import document_bos, load_tokenizer, tokenizer_fingerprint
from revpatch.distributed import cores
from revpatch.distributed.ranks import Ranks
from revpatch.shards.format import MANIFEST_NAME
from revpatch.terminal import say
from revpatch.train.preflight import locations, phase_of

_POLL_SECONDS = 1.0


def needs_building(config: Config) -> bool:
    """Return whether the config names a raw source anywhere."""
    return any(is_raw_source(place) for _, place in locations(config))


def build_on_first_use(config: Config, peers: Ranks, begun: bool = False) -> tuple[Config, dict[int, ConfigError]]:
    """Return the config with folders of shards in place of its raw sources, once they are there; and, of a run that has
    `begun`, the phases whose shards are not to be had, and why: they may be committed.

    Raises:
        ConfigError: a source is trained on and held out at once; or what else went wrong on rank 0, on every rank; or,
            on the ranks that wait, that rank 0 took longer than the run's time-out.
    """
    folders: dict[str, str | ConfigError] | ConfigError | None = None
    if peers.rank == 0:
        try:
            folders = _build_all(config, peers.world, begun)
        except (OSError, ValueError) as error:
            folders = ConfigError(str(error))
    try:
        folders = peers.from_rank0(folders)
    except RuntimeError as error:
        names = ", ".join(sorted({place for _, place in locations(config) if is_raw_source(place)}))
        raise ConfigError(
            f"rank {peers.rank} waited for rank 0 to build the shards of {names}, which failed or took longer than "
            f"engine.timeout_minutes = {config.engine.timeout_minutes:g}: start again to resume building, raise the "
            "time-out, or build them first with `revpatch shards build`"
        ) from error
    if isinstance(folders, ConfigError):
        raise folders
    assert folders is not None
    data = config.model_dump(mode="json")
    missing: dict[int, ConfigError] = {}
    for key, folder in folders.items():
        if isinstance(folder, ConfigError):
            missing.setdefault(phase_of(key), folder)
            continue
        *parents, last = key.split(".")
        target: Any = data
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target[part]
        target[last] = folder
    return Config.model_validate(data), missing


def _build_all(config: Config, world: int, begun: bool = False) -> dict[str, str | ConfigError]:
    """Return the folder of each key that names a raw source; or what went wrong, where phases of a run that has `begun`
    alone name it."""
    tokenizer = load_tokenizer(config.base.model, config.base.revision)
    keys: dict[str, list[str]] = {}
    for key, place in locations(config):
        if is_raw_source(place):
            keys.setdefault(place, []).append(key)
    folders: dict[str, str | ConfigError] = {}
    for place, named in keys.items():
        probes = [key for key in named if key.startswith("probes.")]
        shared = 0 < len(probes) < len(named)
        if shared and not config.build.holdout:
            raise ConfigError(
                f"{place} is named by {', '.join(named)}: a probe must be held out. Set build.holdout to the fraction "
                "of its documents that the probe gets, or name other text"
            )
        try:
            try:
                folder = _build(config, place, tokenizer, config.build.holdout if shared else 0.0, world)
            except BadDocumentError as error:
                raise ConfigError(
                    f"{error}: `revpatch shards build {place} --on-bad skip ...`, and name its folder of shards here"
                ) from error
        except (OSError, ValueError) as error:
            if not begun or not all(key.startswith("phases.") for key in named):
                raise ConfigError(f"{named[0]} = {place}: {error}") from error
            folders |= {key: ConfigError(f"{key} = {place}: {error}") for key in named}
            continue
        for key in named:
            folders[key] = f"{folder}_probe" if shared and key in probes else str(folder)
    return folders


def _build(config: Config, place: str, tokenizer: Any, holdout: float, world: int) -> Path:
    build = config.build
    inputs = [{"name": found.name, **found.identity} for found in find_inputs([place], warn=False)]
    made: list[Any] = [tokenizer_fingerprint(tokenizer), config.base.block_size, build.text_column, holdout]
    if bos := document_bos(tokenizer):
        made.append(bos)
    digest = hashlib.sha256(json.dumps([place, inputs, made]).encode()).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name_of_source(place)).strip("-")[:40] or "source"
    folder = Path(build.folder).absolute() / f"{slug}-{digest[:12]}"
    if (folder / MANIFEST_NAME).is_file():
        return folder
    waiting = f"; {world - 1} other ranks wait, at most {config.engine.timeout_minutes:g} minutes" if world > 1 else ""
    say(f"building the shards of {place} in {folder}, on first use{waiting}")
    deadline = time.monotonic() + 60 * config.engine.timeout_minutes
    while not (folder / MANIFEST_NAME).is_file():
        try:
            with shown_progress() as progress:
                build_shards(
                    [place],
                    tokenizer,
                    config.base.block_size,
                    folder,
                    text_column=build.text_column,
                    holdout=holdout,
                    workers=cores(),
                    progress=progress,
                )
        except BlockingIOError:  # another run builds them just now
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)
    return folder
