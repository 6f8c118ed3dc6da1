"""The run: phases in order, and in each the loop of step, probe, roll back, commit.

Every rank runs this file line by line alike. What only rank 0 knows (probe losses, the verdict) reaches the others
through `peers.from_rank0`; what only rank 0 does (write, show) is inside `Record`.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import nn

from revpatch.config import Config, PhaseConfig
from revpatch.patch.patched_model import attach, patch_state, switchboard
from revpatch.stream.replay import ReplayMixture, write_replay
from revpatch.stream.shard_set import ShardSet
from revpatch.training import startup
from revpatch.training.batches import Batches
from revpatch.training.engine import fresh_state, make_engine
from revpatch.training.guard import Comparison, Keep, Rollback, Stop, decide, stopped_phase_keeps
from revpatch.training.invertibility import Invertibility, measure_invertibility
from revpatch.training.launch import Launch, Peers, process_group
from revpatch.training.objective import TERMS, PatchObjective
from revpatch.training.phase import Phase
from revpatch.training.preflight import Plan, check
from revpatch.training.probe import Measurement, Prober
from revpatch.training.record import Meter, Record
from revpatch.training.rollback import GoodState, restore
from revpatch.training.schedule import learning_rate
from revpatch.training.teacher import Teacher
from revpatch.training.watch import Sets, Watch

log = logging.getLogger("revpatch")
Verdict = Keep | Rollback | Stop


def train(config: Config) -> Path:
    """Trains every phase of the config on this rank; returns the run's folder.

    Raises:
        ConfigError, FileNotFoundError, ValueError: the config can't be used; before any process group is formed.
        FileExistsError: the run's folder is taken.
        RuntimeError: the engine's world is not the launcher's, or two ranks disagree after a rollback.
    """
    launch = Launch.from_environment()
    plan = check(config, launch.world)
    device = launch.device()
    with process_group(launch, device, config.engine.timeout_minutes) as peers:
        base = startup.load_base(config.base, device)  # first, so that a base that fails leaves no folder behind
        directory = startup.prepare_run(config, peers)
        record = Record(directory, peers.rank == 0, config.monitoring.tensorboard)
        try:
            Trainer(config, plan, base, peers, record, directory).run()
        finally:
            record.close()
    return directory


class Trainer:
    """One rank's part of a run.

    Args:
        config: the run's config.
        plan: what it reads.
        base: the frozen base, on this rank's device.
        peers: the other ranks.
        record: what rank 0 writes; does nothing elsewhere.
        directory: the run's folder.
    """

    def __init__(
        self, config: Config, plan: Plan, base: nn.Module, peers: Peers, record: Record, directory: Path
    ) -> None:
        self.config, self.plan, self.peers, self.record, self.directory = config, plan, peers, record, directory
        self.base = base
        identity = startup.identity(config, self.base, plan.tokenizer)
        torch.manual_seed(config.seed)
        self.patch = attach(self.base, config.sidecar)
        switchboard(self.base).checkpointing = config.base.activation_checkpointing
        if config.base.compile:
            startup.compile_base(self.base)
        self.teacher = Teacher(self.base)
        objective = PatchObjective(self.base, self.patch, self.teacher, config.objective)
        self.engine = make_engine(config, objective, peers)
        sets = list(zip(config.probes.sets, plan.probes, strict=True))
        prober = Prober(self.base, sets, rows=2 * config.batch.micro_blocks)
        self.watch = Watch(config, prober, enabled=peers.rank == 0)
        self.meter = Meter()
        self.identity = identity
        self.replay = [] if plan.replay_base is None else [plan.replay_base]
        self.committed: dict[str, Measurement] = {}
        self._announce()

    def run(self) -> None:
        """All phases."""
        first_step = 0
        for index, config in enumerate(self.config.phases):
            phase = self._begin(index, config, first_step)
            self._train(phase)
            self._commit(phase)
            first_step += config.steps
        self.record.event("run_end")

    def _train(self, phase: Phase) -> None:
        """The loop."""
        steps = phase.config.steps
        with phase.batches.stream(steps) as stream:
            for step, micro_batches in enumerate(stream, start=1):
                rate = phase.lr_factor * learning_rate(self.config.optimizer, step, steps)
                self.meter.add(*self.engine.train_step(phase.batches.to_device(micro_batches), rate))
                phase.pending.append(step)
                self.record.advance(self._tokens_a_step())

                verdict: Verdict = Keep()
                if step % self.config.monitoring.every == 0 or self._probe_due(step, steps):
                    verdict = self._log(phase, step, rate)
                if isinstance(verdict, Keep) and self._probe_due(step, steps):
                    verdict = self._probe(phase, step)
                if isinstance(verdict, Rollback):
                    self._roll_back(phase, step, verdict.reason)
                elif isinstance(verdict, Stop):
                    self._stop(phase, step, verdict.reason)
                    return
        if phase.pending:
            self._return_to(phase, steps, phase.good, "the phase ended with a probe above its tolerance")

    def _begin(self, index: int, config: PhaseConfig, first_step: int) -> Phase:
        """Fresh optimizer state, the first probe and the start entry."""
        batch, peers = self.config.batch, self.peers
        mixture = ReplayMixture(self.replay, batch.replay_blocks, self.config.seed) if self.replay else None
        batches = Batches(self.plan.phases[index], self.plan.lanes[index], mixture, batch, peers, first_step)
        state = fresh_state(self.patch)
        restore(self.engine, self.patch, state, peers)
        measured = self.committed = self.committed or self.watch.measure()
        self.record.event("phase_start", phase=config.name, phase_index=index, steps=config.steps)
        start = GoodState(0, state, measured)
        phase = Phase(index, config, batches, start, start)
        start.comparisons = self.watch.compare(phase, measured)
        start.entry = self._enter("start", phase, 0, self.watch.sets(phase, measured, start.comparisons))
        self.record.begin_phase(config.name, config.steps)
        return phase

    def _log(self, phase: Phase, step: int, rate: float) -> Verdict:
        """Means over steps and ranks; a loss that is not finite on one rank is seen by all, at the same step."""
        mean = self.meter.take()
        if mean is None:
            return Keep()
        mean = self.peers.mean_(mean).cpu()
        norm = self.engine.grad_norm()
        terms, layers = mean[: len(TERMS)], mean[len(TERMS) :].view(2, -1)
        scale = self.patch.log_scales().detach().exp().cpu()
        named = {"gate": layers[0], "patch_norm": layers[1], "scale": scale}
        self.record.steps(
            phase.config.name,
            step,
            phase.config.steps,
            phase.global_step(step),
            terms,
            named,
            self.patch.layers,
            rate,
            norm,
        )
        finite = bool(torch.isfinite(mean).all()) and (norm is None or bool(torch.isfinite(torch.as_tensor(norm))))
        return decide([], phase.rollbacks, self.config.rollback.max_rollbacks, nonfinite=not finite)

    def _probe(self, phase: Phase, step: int) -> Verdict:
        """Rank 0 measures and decides; if the state is good, all ranks take part in keeping it."""
        measured = self.watch.measure()
        verdict: Verdict | None = None
        comparisons: list[Comparison] = []
        sets: Sets = {}
        if self.peers.rank == 0:
            comparisons = self.watch.compare(phase, measured)
            sets = self.watch.sets(phase, measured, comparisons)
            self.record.probed(phase.config.name, step, phase.global_step(step), sets)
            finite = self.watch.finite(measured) and all(bool(p.isfinite().all()) for p in self.patch.parameters())
            verdict = decide(comparisons, phase.rollbacks, self.config.rollback.max_rollbacks, nonfinite=not finite)
        phase.probed = (step, sets)
        verdict = self.peers.from_rank0(verdict)
        self.record.restart_clock()
        if isinstance(verdict, Keep) and verdict.good:
            phase.good = GoodState(step, self.engine.state(), measured, comparisons)
            phase.good.entry = self._enter("good", phase, step, sets)
            phase.learned += phase.pending
            phase.pending = []
            if self.record.ledger is not None:
                self.record.ledger.prune_good(self.config.ledger.keep_good)
        return verdict

    def _roll_back(self, phase: Phase, step: int, reason: str) -> None:
        """Back to the last good state, at a lower rate; the data go on past the window."""
        phase.lr_factor *= self.config.rollback.lr_factor
        self._return_to(phase, step, phase.good, reason)

    def _stop(self, phase: Phase, step: int, reason: str) -> None:
        """The phase ends, with its last good state or, if that was measurably harmed, with its start."""
        keeps = stopped_phase_keeps(phase.good.comparisons) if self.peers.rank == 0 else None
        target = phase.good if self.peers.from_rank0(keeps) else phase.start
        self._return_to(phase, step, target, reason)

    def _return_to(self, phase: Phase, step: int, target: GoodState, reason: str) -> None:
        phase.rollbacks += 1
        undone = [learned for learned in phase.learned if learned > target.step] + phase.pending
        phase.learned = [learned for learned in phase.learned if learned <= target.step]
        probed_at, sets = phase.probed
        self._enter("rollback", phase, step, sets if probed_at == step else {})
        self.record.descend_from(target.entry)
        restore(self.engine, self.patch, target.engine if self.peers.rank == 0 else None, self.peers)
        phase.pending, phase.good = [], target
        self.meter.take()
        self.record.event(
            "rollback",
            phase=phase.config.name,
            step=step,
            to_file=target.entry,
            reason=reason,
            window=[undone[0], step],
            new_lr_factor=phase.lr_factor,
        )
        words = f"{phase.config.name} rolled back at {step} to {target.entry}: {reason}"
        self.record.text(phase.global_step(step), "event/rollback", words)

    def _commit(self, phase: Phase) -> None:
        """The phase's last good state becomes the teacher, and a sample of what it learned is kept for replay."""
        self.record.end_phase()
        good, name = phase.good, phase.config.name
        comparisons = self.watch.compare(phase, good.measurements)
        sets = {
            name: {**values, "reference": values["before"], "rise": values["drift"]}
            for name, values in self.watch.sets(phase, good.measurements, comparisons).items()
        }
        entry = self._enter("commit", phase, good.step, sets)
        self.committed = good.measurements
        self.teacher.follow(self.patch)
        self._keep_replay(phase)
        inverse = None
        if self.peers.rank == 0 and self.config.sidecar.check_invertibility:
            inverse = str(self._invertibility(self.plan.phases[phase.index]))
        self.record.event(
            "commit",
            phase=name,
            step=good.step,
            file=entry,
            rollbacks=phase.rollbacks,
            inverse_error=inverse,
            sets=sets,
        )
        words = "  ".join(f"{key} {values['loss']:.4f} ({values['drift']:+.4f})" for key, values in sets.items())
        self.record.text(phase.global_step(phase.config.steps), "event/commit", f"{name} committed: {words}")

    def _keep_replay(self, phase: Phase) -> None:
        if not self.config.batch.replay_blocks or not phase.learned:
            return
        directory, name = self.directory / "replay", f"{phase.index:03d}_{phase.config.name}"
        if self.peers.rank == 0:
            ids = phase.batches.sample(self.config.seed, phase.learned, self.config.replay.blocks_per_phase)
            write_replay(self.plan.phases[phase.index], ids, directory, name)
        self.peers.barrier()
        self.replay.append(ShardSet(directory / name))

    def _invertibility(self, shards: ShardSet, noise: float = 0.0) -> Invertibility:
        tokens = torch.from_numpy(shards.read(np.zeros(1, np.int64))).to(self.peers.device)
        return measure_invertibility(self.base, self.patch, tokens, noise)

    def _enter(self, kind: str, phase: Phase, step: int, sets: Sets) -> str:
        if self.peers.rank != 0:
            return ""
        losses = {name: values["loss"] for name, values in sets.items()}
        metadata = {**self.identity, "probes": losses}
        return self.record.entry(kind, phase.index, phase.config.name, step, patch_state(self.patch), metadata, sets)

    def _probe_due(self, step: int, steps: int) -> bool:
        return step % self.config.probes.every == 0 or step == steps

    def _tokens_a_step(self) -> int:
        return (self.config.batch.new_blocks + self.config.batch.replay_blocks) * self.config.base.block_size

    def _announce(self) -> None:
        facts = startup.facts(self.config, self.base, self.patch, self.engine, self.peers)
        if self.config.sidecar.check_invertibility:
            facts["inverse error, weights ± 0.02"] = str(self._invertibility(self.plan.phases[0], noise=0.02))
        if self.peers.rank == 0:
            startup.show(facts)
        self.record.event("run", base=self.identity["base"], seed=self.config.seed, facts=facts)
