"""The run: phases in order, and in each the loop of step, probe, roll back, commit.

Every rank runs this file line by line alike. What only rank 0 knows (probe losses, the verdict) reaches the others
through `peers.from_rank0`; what only rank 0 does (write, show) is inside `Record`.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing

import torch

from revpatch.config import PhaseConfig
from revpatch.evaluation.guard import Comparison, Keep, Rollback, Stop, decide, stopped_phase_keeps
from revpatch.evaluation.probe import in_words
from revpatch.evaluation.proofs import fingerprint_base
from revpatch.ledger.events import Readings
from revpatch.patch.patched_model import patch_disabled, patch_state
from revpatch.shards.format import ShardError, ShardFault
from revpatch.shards.replay import write_replay
from revpatch.step.engine import fresh_state, learning_rate
from revpatch.step.objective import TERMS
from revpatch.train.batches import Batch, failure_of, stopping
from revpatch.train.rollback import GoodState, restore_state
from revpatch.train.state import Phase, RunState

log = logging.getLogger("revpatch")
Verdict = Keep | Rollback | Stop

KEEP_GOOD = 3
"""So many `good` entries of each phase are kept, the newest."""


class Trainer(RunState):
    """One rank's part of a run; made as `RunState` is."""

    def run(self) -> bool:
        """Return all phases, from where the run stands; false if a signal ended it before the last."""
        first_step = 0
        for index, config in enumerate(self.config.phases):
            if self.resumed is None or index >= self.resumed.phase_index:
                phase = self._begin(index, config, first_step)
                if not self._train(phase):
                    return False
                self._commit(phase)
            first_step += config.steps
        if self.peers.rank == 0:
            with patch_disabled(self.base):
                self.record.end(fingerprint_base(self.base))
        return True

    def _train(self, phase: Phase) -> bool:
        """Return the loop; false if a signal ended it."""
        steps = phase.config.steps
        with closing(phase.batches.stream(steps, phase.done)) as stream:
            for ready in stream:
                self._note(phase, ready)
                if ready.interrupted:
                    self._interrupt(phase)
                    return False
                step = ready.step
                rate = phase.lr_factor * learning_rate(self.config.optimizer, step, steps)
                self.meter.add(*self.engine.train_step(phase.batches.to_device(ready.micro_batches), rate))
                phase.done = step
                phase.pending.append(step)
                self.record.advance(self._tokens_a_step(), phase.batches.waited)

                verdict: Verdict = Keep()
                if step % self.config.monitoring.every == 0 or self._probe_due(step, steps):
                    verdict = self._log(phase, step, rate)
                if isinstance(verdict, Keep) and self._probe_due(step, steps):
                    verdict = self._probe(phase, step)
                if not self._carry_out(verdict, phase, step):
                    return True
                if step % self.config.snapshot.every == 0:
                    self.take_snapshot(phase)
        # Of a phase whose steps were lowered to those that it had made already, the last was no reason to probe then.
        if phase.pending and phase.probed[0] != steps and not self._carry_out(self._probe(phase, steps), phase, steps):
            return True
        if phase.pending:
            self._return_to(phase, steps, phase.good, "the phase ended with a probe above its tolerance")
        return True

    def _begin(self, index: int, config: PhaseConfig, first_step: int) -> Phase:
        """Return the phase where a snapshot left it; or fresh optimizer state, the first probe and the start entry."""
        batches = self.batches(index, first_step)
        if batches.replay is not None:
            self.teacher.expect(batches.replay.blocks)
        resumed, self.resumed = self.resumed, None
        if resumed is not None and resumed.phase is not None:
            phase = Phase.of(index, config, batches, resumed.phase)
            self.record.begin_phase(config.name, config.steps, phase.done)
            return phase
        state = fresh_state(self.patch)
        restore_state(self.engine, self.patch, state, self.peers)
        measured = self.committed = self.committed or self.watch.measure()
        self.record.event("phase_start", phase=config.name, phase_index=index, steps=config.steps)
        start = GoodState(0, state, measured)
        phase = Phase(index, config, batches, start, start)
        start.comparisons = self.watch.compare(phase, measured)
        sets = self.watch.sets(phase, measured, start.comparisons)
        if index == 0:
            sets = self.watch.with_blocks(sets, measured)
            self.write_samples(self.begins_with, first_step)
        start.entry, start.sha256 = self._enter("start", phase, 0, sets)
        self.record.show_probes(first_step, sets, self.watch.spreads(measured, self.patch.layers))
        self.record.begin_phase(config.name, config.steps)
        return phase

    def _note(self, phase: Phase, ready: Batch) -> None:
        """Puts down what the stream met on the way to this step."""
        for broken in ready.quarantined:
            self.record.event("quarantine", phase=phase.config.name, step=ready.step, **broken.as_fields())
            words = f"{phase.config.name}: from step {ready.step} on without {broken.location}: {broken.reason}"
            self.record.happened(phase.global_step(ready.step), "quarantine", words)
        parts, epochs = phase.batches.mixture.parts, phase.batches.mixture.epochs(ready.step - 1)
        if phase.epochs and epochs != phase.epochs:
            left = ", ".join(str(part.carried(epoch)) for part, epoch in zip(parts, epochs, strict=True))
            named = f"{phase.config.name} epoch {', '.join(str(epoch) for epoch in epochs)}"
            if self.peers.rank == 0:
                log.info("%s begins at %d, with %s blocks left over of the one before", named, ready.step, left)
        phase.epochs = epochs

    def _log(self, phase: Phase, step: int, rate: float) -> Verdict:
        """Means over steps and ranks; a loss that is not finite on one rank is seen by all, at the same step."""
        mean = self.meter.take()
        if mean is None:
            return Keep()
        began = time.perf_counter()
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
            self.engine.clock.take(),
        )
        self.record.time(phase.global_step(step), self.engine.overlapped())
        hit_rate = None if self.teacher.cache is None else self.teacher.cache.take_rate()
        if hit_rate is not None:
            self.record.scalar(phase.global_step(step), "teacher/cache_hit_rate", hit_rate)
        finite = bool(torch.isfinite(mean).all()) and (norm is None or bool(torch.isfinite(torch.as_tensor(norm))))
        self.record.time(phase.global_step(step), {"logging": time.perf_counter() - began})
        return decide([], phase.rollbacks, self.config.rollback.max_rollbacks, nonfinite=not finite)

    def _probe(self, phase: Phase, step: int) -> Verdict:
        """Rank 0 measures and decides; if the state is good, all ranks take part in keeping it."""
        began = time.perf_counter()
        measured = self.watch.measure()
        self.record.time(phase.global_step(step), {"probe": time.perf_counter() - began})
        verdict: Verdict | None = None
        comparisons: list[Comparison] = []
        sets: Readings = {}
        if self.peers.rank == 0:
            comparisons = self.watch.compare(phase, measured)
            sets = self.watch.sets(phase, measured, comparisons)
            spreads = self.watch.spreads(measured, self.patch.layers)
            self.record.probed(phase.config.name, step, phase.global_step(step), sets, spreads)
            finite = self.watch.finite(measured) and all(bool(p.isfinite().all()) for p in self.patch.parameters())
            verdict = decide(comparisons, phase.rollbacks, self.config.rollback.max_rollbacks, nonfinite=not finite)
        phase.probed = (step, sets)
        verdict = self.peers.from_rank0(verdict)
        self.record.restart_clock()
        if isinstance(verdict, Keep) and verdict.good:
            phase.good = GoodState(step, self.engine.state(), measured, comparisons)
            phase.good.entry, phase.good.sha256 = self._enter("good", phase, step, sets)
            phase.learned += phase.pending
            phase.pending = []
            if self.record.ledger is not None:
                self.record.ledger.prune_good(KEEP_GOOD)
        return verdict

    def _carry_out(self, verdict: Verdict, phase: Phase, step: int) -> bool:
        """Does what was decided; false if the phase ends with it."""
        if isinstance(verdict, Rollback):
            self._roll_back(phase, step, verdict.reason)
        elif isinstance(verdict, Stop):
            self._stop(phase, step, verdict.reason)
            return False
        return True

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
        self.record.parent = target.sha256
        restore_state(self.engine, self.patch, target.engine if self.peers.rank == 0 else None, self.peers)
        self.teacher.forget()
        phase.pending, phase.good = [], target
        self.meter.take()
        # Whether that brought the probes back is measured, not taken for granted: `report` shows it.
        measured = self.watch.measure()
        restored = self.watch.sets(phase, measured, self.watch.compare(phase, measured))
        self.record.restart_clock()
        self.record.event(
            "rollback",
            phase=phase.config.name,
            step=step,
            to_file=target.entry,
            reason=reason,
            window=[undone[0], step],
            new_lr_factor=phase.lr_factor,
            restored=restored,
        )
        words = f"{phase.config.name} rolled back at {step} to {target.entry}: {reason}"
        self.record.happened(phase.global_step(step), "rollback", words)

    def _commit(self, phase: Phase) -> None:
        """The phase's last good state becomes the teacher, and a sample of what it learned is kept for replay."""
        self.record.end_phase()
        good, name = phase.good, phase.config.name
        comparisons = self.watch.compare(phase, good.measurements)
        sets = {
            name: reading.model_copy(update={"reference": reading.before, "rise": reading.drift})
            for name, reading in self.watch.sets(phase, good.measurements, comparisons).items()
        }
        entry, _ = self._enter("commit", phase, good.step, sets)
        self.committed = good.measurements
        self.teacher.follow(self.patch)
        self._keep_replay(phase)
        inverse = None
        if self.peers.rank == 0 and self.config.sidecar.check_invertibility:
            inverse = str(self.invertibility(self.plan.phases[phase.index]))
        self.record.event(
            "commit",
            phase=name,
            step=good.step,
            file=entry,
            rollbacks=phase.rollbacks,
            inverse_error=inverse,
            sets=self.watch.with_blocks(sets, good.measurements),
        )
        self.record.show_probes(phase.global_step(phase.config.steps), sets, {})
        self.record.happened(phase.global_step(phase.config.steps), "commit", f"{name} committed: {in_words(sets)}")
        self.write_samples(name, phase.global_step(phase.config.steps))
        self.take_snapshot(phase, committed=True)
        self.snapshots.finish()

    def _keep_replay(self, phase: Phase) -> None:
        """A sample of what the phase learned, written by rank 0; shards that turn out to be broken are read around."""
        if not self.config.batch.replay_blocks or not phase.learned:
            return
        name, broken, kept = f"{phase.index:03d}_{phase.config.name}", [], False
        failure: ShardFault | str | None = None
        while self.peers.rank == 0:
            ids = phase.batches.sample(self.config.seed, phase.learned, self.config.replay.blocks_per_phase)
            try:
                if kept := len(ids) > 0:
                    write_replay(self.plan.phases[phase.index], ids, self.directory / "replay", name)
                break
            except ShardError as error:
                failure = failure_of(error, rank=0)
                if self.config.stream.on_error == "stop" or not isinstance(failure, ShardFault):
                    break
                found = phase.batches.out_from(failure, phase.done + 1)
                if not self.quarantine.add(found):
                    break
                broken.append(found)
                failure = None
        broken, kept, failure = self.peers.from_rank0((broken, kept, failure))
        if failure is not None:
            raise stopping([failure])
        for found in broken:
            self.quarantine.add(found)
        self._note(phase, Batch(phase.done, quarantined=broken))
        if kept:
            self.add_sample(name)

    def _interrupt(self, phase: Phase) -> None:
        """A signal asked to stop: a snapshot, on disk before anything else."""
        self.take_snapshot(phase)
        self.snapshots.finish()
        self.record.end_phase()
        self.record.event("interrupted", phase=phase.config.name, step=phase.done)
        words = (
            f"stopped by a signal after step {phase.done} of {phase.config.name}; the same command resumes from here"
        )
        self.record.happened(phase.global_step(phase.done), "interrupted", words)

    def _enter(self, kind: str, phase: Phase, step: int, sets: Readings) -> tuple[str, str | None]:
        if self.peers.rank != 0:
            return "", None
        losses = {name: reading.loss for name, reading in sets.items()}
        metadata = {**self.identity, "probes": losses}
        return self.record.entry(kind, phase.index, phase.config.name, step, patch_state(self.patch), metadata, sets)

    def _probe_due(self, step: int, steps: int) -> bool:
        return step % self.config.probes.every == 0 or step == steps

    def _tokens_a_step(self) -> int:
        return (self.config.batch.new_blocks + self.config.batch.replay_blocks) * self.config.base.block_size
