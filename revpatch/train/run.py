"""A run, from a config to its end, on this rank: check, join the others, claim the folder, train."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from revpatch.config import Config, ConfigError
from revpatch.distributed import Launch
from revpatch.distributed.ranks import process_group
from revpatch.distributed.signals import Interruption
from revpatch.monitoring.record import Record
from revpatch.terminal import doing, say
from revpatch.train import startup
from revpatch.train.first_use import build_on_first_use, needs_building
from revpatch.train.own_text import build_own_text
from revpatch.train.preflight import check, check_base
from revpatch.train.resume import begins_anew, check_same_config, has_begun
from revpatch.train.trainer import Trainer

log = logging.getLogger("revpatch")


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    directory: Path
    """The run's folder."""
    interrupted: bool = False
    """By a signal, after a snapshot was written."""


def train_run(config: Config, fresh: bool = False, overwrite: bool = False) -> Outcome:
    """Trains every phase of the config on this rank, from where the run in its folder stands.

    Args:
        config: the run's config.
        fresh: begin a new run; refused where there is one, unless `overwrite` deletes it. Of a command that its
            launcher starts again, it was done before: the run is resumed.
        overwrite: see `fresh`.

    Raises:
        ConfigError, FileNotFoundError, ValueError: the config can't be used, or is not that of the run in its folder.
        FileExistsError: the run's folder is taken.
        ShardError: a shard is broken; on all ranks, at the same step.
        RuntimeError: the engine's world is not the launcher's, or two ranks disagree.
    """
    with Interruption() as interruption:
        return _train(config, fresh, overwrite, interruption)


def _train(config: Config, fresh: bool, overwrite: bool, interruption: Interruption) -> Outcome:
    launch = Launch.from_environment()
    device = launch.device()
    raw = needs_building(config)
    begun = has_begun(config) and not begins_anew(config, fresh)
    first = launch.rank == 0
    with doing("checking base, tokenizer and shards", say, first):
        plan = None if raw else check(config, launch.world, begun)
        if raw:
            check_base(config, launch.world)
    with process_group(launch, device, config.engine.timeout_minutes) as peers:
        check_same_config(config, peers)
        reads, not_built = config, dict[int, ConfigError]()
        if plan is None:
            reads, not_built = build_on_first_use(config, peers, begun)
            plan = check(reads, launch.world, begun, not_built)
        with doing("waiting for the other ranks", say, first):
            startup.check_same_data(reads, plan, peers)
        with doing(f"loading the base {config.base.model}", say, first):
            base, weights = startup.load_same_base(config.base, peers)  # first: one that fails leaves no folder behind
        status = startup.prepare_run(config, peers, fresh, overwrite)
        if status.over:
            if peers.rank == 0:
                log.info("the run in %s is over: every phase is committed; add a phase to train on", status.directory)
            return Outcome(status.directory)
        if config.replays_own_text:  # once the run's folder is known not to be taken: it may take minutes
            reads = reads.with_own_text(str(build_own_text(config, base, weights, peers)))
            plan = check(reads, launch.world, begun, not_built)
            startup.check_same_data(reads, plan, peers)
        plan.check_phases(0 if status.snapshot is None else status.snapshot.phase_index)
        watched = config.monitoring
        record = Record(status.directory, peers.rank == 0, watched.tensorboard, status.again, watched.trackers)
        try:
            with doing("hashing the base, reading the probe sets", log.info, first):
                trainer = Trainer(reads, plan, base, peers, record, status.directory, interruption, weights)
            with doing("preparing the first step", log.info, first):
                trainer.begin_from(status)
            interruption.training = True
            interruption.settled = interrupted = not trainer.run()
            return Outcome(status.directory, interrupted)
        finally:
            record.close()
