"""What one rank trains with: the phase it is in, the probes and their comparisons, and all of it in a snapshot."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from revpatch.config import Config, PhaseConfig, ProbeSetConfig
from revpatch.distributed.ranks import Ranks, bfloat16_is_slow
from revpatch.evaluation.guard import Comparison, ProbeSet, compare_all
from revpatch.evaluation.probe import Measurement, Prober, put_together, reading_of
from revpatch.evaluation.proofs import Invertibility, fingerprint_base, measure_invertibility
from revpatch.generate import Sampler
from revpatch.ledger.events import Readings
from revpatch.ledger.ledger import PatchFile, place_now
from revpatch.monitoring.record import Record, RunningMean
from revpatch.patch.channels import measure_channels
from revpatch.patch.patched_model import attach, load_tensors, switchboard
from revpatch.shards.format import ShardError
from revpatch.shards.quarantine import Quarantine
from revpatch.shards.replay import ReplayMixture
from revpatch.shards.shard_set import Corpus, ShardSet
from revpatch.step.engine import make_engine
from revpatch.step.frozen_base import make_lean
from revpatch.step.head_loss import compiled, in_place
from revpatch.step.objective import PatchObjective
from revpatch.step.teacher import Teacher
from revpatch.terminal import doing
from revpatch.train import startup
from revpatch.train.batches import Batches
from revpatch.train.preflight import Plan
from revpatch.train.resume import RunStatus, check_identity, check_origin, check_shards, go_back
from revpatch.train.rollback import GoodState, restore_state
from revpatch.train.snapshot import PhaseProgress, Snapshot, SnapshotWriter, random_state, set_random_state
from revpatch.train.startup import flops_a_token, memory_in_use


@dataclass
class Phase:
    """Where a phase is."""

    index: int
    config: PhaseConfig
    batches: Batches
    start: GoodState
    good: GoodState
    learned: list[int] = field(default_factory=list)
    """Steps whose effect is in the good state."""
    pending: list[int] = field(default_factory=list)
    """Steps since then."""
    probed: tuple[int, Readings] = (0, {})
    """The step of the last probe, and what the journal keeps of it."""
    rollbacks: int = 0
    """States given up so far."""
    lr_factor: float = 1.0
    done: int = 0
    """Optimizer steps made."""
    epochs: list[int] = field(default_factory=list)
    """The epoch that each of its sets of shards is in; empty before the first step."""

    @classmethod
    def of(cls, index: int, config: PhaseConfig, batches: Batches, progress: PhaseProgress) -> Phase:
        """Return a phase where a snapshot left it."""
        epochs = batches.mixture.epochs(progress.step - 1) if progress.step else []
        return cls(
            index,
            config,
            batches,
            progress.start,
            progress.good,
            list(progress.learned),
            list(progress.pending),
            progress.probed,
            progress.rollbacks,
            progress.lr_factor,
            progress.step,
            epochs,
        )

    def progress(self) -> PhaseProgress:
        """Return what a snapshot keeps of it."""
        return PhaseProgress(
            self.done,
            self.start,
            self.good,
            list(self.learned),
            list(self.pending),
            self.probed,
            self.rollbacks,
            self.lr_factor,
        )

    def global_step(self, step: int) -> int:
        """Optimizer steps of the run at a step of this phase."""
        return self.batches.first_step + step


log = logging.getLogger("revpatch")


class Watch:
    """The probes of a run; rank 0 compares. With `probes.placement` "rank0" it measures too, and on the others
    everything is empty; with "all" every rank measures a share, and all have the whole.

    Args:
        config: the run's config.
        base: the patched base model.
        shards: of each probe set.
        peers: the other ranks.
    """

    def __init__(self, config: Config, base: nn.Module, shards: Sequence[ShardSet], peers: Ranks) -> None:
        self.config, self.peers = config, peers
        self.shared = config.probes.placement == "all" and peers.world > 1
        sets = list(zip(config.probes.sets, shards, strict=True))
        share = (peers.rank, peers.world) if self.shared else (0, 1)
        self.prober = Prober(base, sets, 2 * config.batch.micro_blocks, share)
        self.first: dict[str, Measurement] = {}

    def measure(self) -> dict[str, Measurement]:
        """Return every set now, by name; the first call is what the base is like. All ranks take part."""
        with doing("measuring the probe sets", log.info, self.peers.rank == 0) as far:
            if self.shared:
                measured = put_together(self.peers.gather(self.prober.measure(far)), self.prober.counts)
            else:
                measured = self.prober.measure(far) if self.peers.rank == 0 else {}
        self.first = self.first or measured
        return measured

    def finite(self, measured: dict[str, Measurement]) -> bool:
        """Return whether every loss of every set, guarded or not, is a number."""
        return all(bool(np.isfinite(measurement.losses).all()) for measurement in measured.values())

    def compare(self, phase: Phase, measured: dict[str, Measurement]) -> list[Comparison]:
        """Return the sets that this phase guards, against the last good state and the phase's start."""
        if self.peers.rank != 0:
            return []
        guarded = [ProbeSet(s.name, s.tolerance) for s in self.config.probes.sets if self._guards(phase, s)]
        losses, good, start = (
            {name: m.losses for name, m in by_name.items()}
            for by_name in (measured, phase.good.measurements, phase.start.measurements)
        )
        rollback = self.config.rollback
        return compare_all(guarded, losses, good, start, rollback.max_drift, rollback.confidence)

    def sets(self, phase: Phase, measured: dict[str, Measurement], comparisons: list[Comparison]) -> Readings:
        """Return loss, reference (the last good state), rise, drift (since the phase's start), gates and patch norm of
        all."""
        compared = {comparison.name: comparison for comparison in comparisons}
        sets: Readings = {}
        for config in self.config.probes.sets if measured else []:
            now, name = measured[config.name], config.name
            reference, start = phase.good.measurements[name].loss, phase.start.measurements[name].loss
            more = {"before": start, "base": self.first[name].loss, "sparsity": now.sparsity}
            sets[name] = reading_of(now, reference, start, config.tolerance, compared.get(name), **more)
        return sets

    def spreads(self, measured: dict[str, Measurement], layers: list[int]) -> dict[str, dict[int, list[float]]]:
        """Return how the gates are spread, by set and by the block that a sidecar follows."""
        return {
            name: dict(zip(layers, measurement.spreads, strict=True))
            for name, measurement in measured.items()
            if measurement.spreads
        }

    def with_blocks(self, sets: Readings, measured: dict[str, Measurement]) -> Readings:
        """The same, with the loss of every block: what intervals between any two commits are made of."""
        return {
            name: reading.model_copy(update={"block_losses": [round(float(loss), 5) for loss in measured[name].losses]})
            for name, reading in sets.items()
        }

    def _guards(self, phase: Phase, probe: ProbeSetConfig) -> bool:
        names = [config.name for config in self.config.phases]
        return probe.guard_after is None or names.index(probe.guard_after) < phase.index


CHANNEL_TOKENS = 8192
"""Tokens on which a base's channels are measured, and at least 8 blocks."""


class RunState:
    """The parts of a run on one rank.

    Args:
        config: the run's config.
        plan: what it reads.
        base: the frozen base, on this rank's device.
        peers: the other ranks.
        record: what rank 0 writes; does nothing elsewhere.
        directory: the run's folder.
        interrupted: asks whether this process was told to stop.
        weights: the base's sha256; None hashes it.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        base: nn.Module,
        peers: Ranks,
        record: Record,
        directory: Path,
        interrupted: Callable[[], bool] = lambda: False,
        weights: startup.BaseWeights | None = None,
    ) -> None:
        self.config, self.plan, self.peers, self.record, self.directory = config, plan, peers, record, directory
        self.base, self.interrupted = base, interrupted
        startup.choose_matmul_precision(config, peers.device)
        weights = weights or startup.BaseWeights.of(base)
        self.identity = startup.identity(config, self.base, weights, plan.tokenizer)
        self.bare_base = fingerprint_base(base, weights.exact) if peers.rank == 0 else None
        """As it came, before anything is put on it."""
        torch.manual_seed(config.seed)
        self.patch = attach(self.base, config.sidecar)
        switchboard(self.base).checkpointing = config.base.activation_checkpointing
        make_lean(self.base)
        if config.base.compile:
            startup.compile_base(self.base)
        knew = None if plan.replay_base is None else plan.replay_base.manifest.digest
        self.teacher = Teacher(self.base, startup.teacher_cache(config.teacher), knew)
        chunk = compiled() if config.base.compile else in_place
        objective = PatchObjective(self.base, self.patch, self.teacher, config.objective, chunk)
        self.engine = make_engine(config, objective, peers)
        self.watch = Watch(config, self.base, plan.probes, peers)
        samples = config.monitoring.samples
        writes = peers.rank == 0 and samples.max_new_tokens > 0
        self.sampler = Sampler(self.base, config.base, samples, self.watch.prober.blocks) if writes else None
        self.meter = RunningMean()
        self.quarantine = Quarantine(config.seed)
        self.samples: list[str] = []
        """Folders under replay/ of what the committed phases left to replay."""
        self.replay = [] if plan.replay_base is None else [plan.replay_base]
        self.committed: dict[str, Measurement] = {}
        self.begins_with = "base"
        """The unpatched base, or the file in the ledger of the patch that the run begins with."""
        self.resumed: Snapshot | None = None
        """What the run resumes from, until the phase it belongs to has begun."""
        self.snapshots = SnapshotWriter(directory / "snapshot")

    def begin_from(self, status: RunStatus) -> None:
        """Brings model, teacher, probes, replay and ledger to where the run stands, and records the resume."""
        if status.snapshot is None and status.origin is None:
            self._measure_channels()
        facts = startup.facts(self.config, self.base, self.patch, self.engine, self.peers)
        if self.config.sidecar.check_invertibility and status.snapshot is None:
            facts["inverse error, weights ± 0.02"] = str(self.invertibility(self.plan.phases[0], noise=0.02))
        if self.peers.rank == 0:
            startup.show_table(facts)
            for notice in self.plan.notices:
                log.warning("%s", notice)
            peak = startup.peak_of(self.config, self.peers.device)
            if peak is None and self.peers.device.type == "cuda":
                log.info(
                    "the peak of %s in %s isn't known: no share of it is shown", facts["device"], self.config.base.dtype
                )
            if self.peers.launch.warning is not None:
                log.warning(self.peers.launch.warning)
            self.record.introduce(self.config, facts, peak)
            self.record.costs = self._costs(peak)
            if self.config.base.dtype == "bfloat16" and self.peers.device.type == "cpu" and bfloat16_is_slow():
                log.warning("this CPU is slower in bfloat16 than in float32: --set base.dtype=float32 is faster here")
        if status.begun:
            self._go_on(status)
        if status.origin is not None and status.snapshot is None:
            self._begin_with(status.origin)
        if status.begun and self.record.ledger is not None:
            go_back(status, self.record.ledger, facts=facts, base_at=place_now(self.config.base.model))
        if status.snapshot is None:
            began = {} if status.origin is None else {"origin": status.origin.path.name}
            known = {"base": self.identity["base"], "bare_base": self.bare_base}
            base_at = place_now(self.config.base.model)
            self.record.event("run", **known, base_at=base_at, seed=self.config.seed, facts=facts, **began)

    def take_snapshot(self, phase: Phase, committed: bool = False) -> None:
        """Copies the state, which all ranks take part in; rank 0 writes it while training goes on.

        `committed`: of the run between this phase and the next. Raises OSError if the one before could not be written.
        """
        began = time.perf_counter()
        state = self.engine.state()
        if self.record.ledger is None:
            return
        step, journal = phase.global_step(phase.config.steps if committed else phase.done), self.record.ledger.journal
        snapshot = Snapshot(
            step=step,
            phase_index=phase.index + committed,
            first_step=step if committed else phase.batches.first_step,
            engine=state,
            phase=None if committed else phase.progress(),
            events=len(journal.records()),
            head=journal.head,
            parent=self.record.parent,
            identity=self.identity,
            digests=self.plan.digests(self.config, None if committed else phase.index),
            replay=list(self.samples),
            quarantine=list(self.quarantine.broken),
            committed=self.committed,
            first=self.watch.first,
            buffers={name: value.cpu() for name, value in self.patch.named_buffers()},
            random=random_state(self.peers.device),
        )
        self.snapshots.write(snapshot)
        self.record.time(step, {"snapshot": time.perf_counter() - began})

    def batches(self, index: int, first_step: int) -> Batches:
        """Return the data of a phase, which begins after so many steps of the run."""
        batch = self.config.batch
        return Batches(
            self.plan.phases[index],
            self.plan.mixtures[index],
            ReplayMixture(self.replay, batch.replay_blocks, self.config.seed) if self.replay else None,
            batch,
            self.peers,
            first_step,
            self.quarantine,
            self.config.stream.on_error,
            self.interrupted,
        )

    def write_samples(self, phase: str, global_step: int) -> None:
        """Rank 0 writes a few texts with the patch that is on the model."""
        if self.sampler is not None:
            began = time.perf_counter()
            self.record.samples(phase, global_step, self.sampler.write())
            self.record.time(global_step, {"samples": time.perf_counter() - began})

    def add_sample(self, name: str) -> None:
        """Rehearses the sample of a phase, in replay/`name`, from here on."""
        self.samples.append(name)
        self.replay.append(ShardSet(self.directory / "replay" / name))

    def invertibility(self, corpus: Corpus, noise: float = 0.0) -> Invertibility:
        """Return how well the map in use can be undone on a block of the corpus, with weights moved by so much
        noise."""
        tokens = torch.from_numpy(self._some_blocks(corpus)).to(self.peers.device)
        with torch.compiler.set_stance("force_eager"):  # once or twice in a run
            return measure_invertibility(self.base, self.patch, tokens, noise)

    def _costs(self, peak: float | None) -> Callable[[float], dict[str, float]]:
        """Return what a step costs besides time, by TensorBoard's tags, at so many tokens a second over all ranks;
        `peak`: of a device, 10¹² operations a second, if it is known."""
        accumulation = self.config.batch.accumulation(self.peers.world)
        wire = startup.gradient_bytes(self.patch, self.engine, accumulation)
        flops = flops_a_token(self.base, self.patch)

        def costs(tokens_per_second: float) -> dict[str, float]:
            found = {"memory/peak_gb": memory_in_use(self.peers.device) / 1e9, "wire/bytes_a_step": float(wire)}
            if peak is not None:
                found["speed/share_of_peak"] = tokens_per_second * flops / (peak * 1e12 * self.peers.world)
            return found

        return costs

    def _measure_channels(self) -> None:
        """Rank 0 measures the base's channels on replayed text, or where nothing is replayed on the first phase's.

        Raises ValueError, on all ranks, for what kept it from that, such as a broken shard.
        """
        corpus = Corpus(self.replay) if self.replay else self.plan.phases[0]
        rows = max(8, CHANNEL_TOKENS // self.config.base.block_size)
        refusal: Exception | None = None
        if self.peers.rank == 0:
            try:
                with torch.compiler.set_stance("force_eager"):  # once in a run
                    measure_channels(self.base, torch.from_numpy(self._some_blocks(corpus, rows)))
            except (OSError, ValueError) as error:
                refusal = error
        refusal, buffers = self.peers.from_rank0(
            (refusal, {name: value.cpu() for name, value in self.patch.named_buffers()})
        )
        if refusal is not None:
            raise refusal
        for name, buffer in self.patch.named_buffers():
            buffer.copy_(buffers[name])

    def _some_blocks(self, corpus: Corpus, rows: int = 1) -> NDArray[np.int64]:
        """Return at most `rows` blocks evenly spread over the corpus, (rows, block_size); or, where broken shards are
        let pass, over the first shard that is whole."""
        blocks = [shard.blocks for shards in corpus.sets for shard in shards.manifest.shards]
        ends = np.cumsum(blocks)
        for first, end in [(0, int(ends[-1])), *zip(ends - blocks, ends, strict=True)]:
            try:
                return corpus.read(np.unique(np.linspace(first, end - 1, min(rows, end - first), dtype=np.int64)))
            except ShardError as error:
                if self.config.stream.on_error == "stop":
                    raise
                broken = error
        raise broken

    def _begin_with(self, origin: PatchFile) -> None:
        """Takes up the patch of a restored run: the first phase starts from it, and is held to it as to a commit."""
        check_origin(origin, self.identity)
        self.watch.measure()  # the base: the patch is still the identity
        load_tensors(self.patch, origin.tensors)
        self.teacher.follow(self.patch)
        self.record.parent, self.begins_with = origin.sha256, origin.path.name
        if self.peers.rank == 0:
            log.info("beginning with %s, restored from another run", origin.path.name)

    def _go_on(self, status: RunStatus) -> None:
        snapshot = status.snapshot
        if self.peers.rank == 0:
            place = "its beginning, as there is no snapshot yet" if snapshot is None else f"snapshot {snapshot.name}"
            log.info("resuming the run in %s from %s", status.directory, place)
        if snapshot is None:
            return
        check_identity(snapshot, self.identity)
        for name, buffer in self.patch.named_buffers():
            buffer.copy_(snapshot.buffers[name])
        check_shards(snapshot, self.plan.digests(self.config, snapshot.phase_index if snapshot.phase else None))
        if snapshot.phase_index or status.origin is not None:  # the teacher is the patch that the phase began with
            committed = snapshot.engine if snapshot.phase is None else snapshot.phase.start.engine
            restore_state(self.engine, self.patch, committed, self.peers)
            self.teacher.follow(self.patch)
        restore_state(self.engine, self.patch, snapshot.engine, self.peers)
        for name in snapshot.replay:
            self.add_sample(name)
        self.quarantine.broken = list(snapshot.quarantine)
        self.committed, self.watch.first = snapshot.committed, snapshot.first
        self.record.parent = snapshot.parent
        set_random_state(snapshot.random)
        self.resumed = snapshot
        phase = snapshot.phase
        for measured in (self.committed,) if phase is None else (phase.start.measurements, phase.good.measurements):
            for name, measurement in measured.items():
                self.record.board.has_shown(name, [measurement.loss])
