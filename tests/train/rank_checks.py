"""Work of several ranks, which run_server.py runs on each of them: the real trainer on real shards, driven by hand.

Rank 0 writes what a check found as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from revpatch.config.file import load_config
from revpatch.distributed import Launch
from revpatch.distributed.ranks import process_group
from revpatch.evaluation.probe import Measurement
from revpatch.monitoring.record import Record
from revpatch.patch.patched_model import base_sha256, patch_state
from revpatch.step.engine import MicroBatch, learning_rate, make_engine
from revpatch.step.objective import PatchObjective
from revpatch.train import startup
from revpatch.train.preflight import check
from revpatch.train.rollback import restore_state, state_sha256
from revpatch.train.state import Phase
from revpatch.train.trainer import Trainer

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
from wire import bytes_sent


def batches_of(phase: Phase, steps: int) -> list[list[MicroBatch]]:
    with closing(phase.batches.stream(steps)) as stream:
        return [ready.micro_batches for ready in stream]


def run_steps(trainer: Trainer, batches: Iterable[list[MicroBatch]], rate: float) -> list[float]:
    return [float(trainer.engine.train_step(batch, rate)[0][0]) for batch in batches]


def whole_engine(trainer: Trainer) -> dict[str, Any]:
    """Losses, the bytes on the wire, exact rollback, and an engine that sees other ranks."""
    trainer._enter = lambda *_: ("", None)  # type: ignore[method-assign]
    found = {**losses(trainer), **one_step(trainer), **exact_rollback(trainer)}
    return {**found, "another_world": another_world(trainer)}


def exact_rollback(trainer: Trainer) -> dict[str, Any]:
    """A step at rate 0 after a rollback against the same step at the good state itself."""
    phase = trainer._begin(0, trainer.config.phases[0], 0)
    batches = batches_of(phase, 12)
    run_steps(trainer, batches[:5], 5e-3)
    good, patch = trainer.engine.state(), patch_state(trainer.patch)
    restore_state(trainer.engine, trainer.patch, good, trainer.peers)
    run_steps(trainer, batches[11:], 0.0)
    reference = state_sha256(trainer.patch, trainer.engine.state())

    restore_state(trainer.engine, trainer.patch, good, trainer.peers)
    run_steps(trainer, batches[5:11], 5e-3)
    moved = max(float((patch_state(trainer.patch)[name] - tensor).abs().max()) for name, tensor in patch.items())
    restored = restore_state(trainer.engine, trainer.patch, good, trainer.peers)
    run_steps(trainer, batches[11:], 0.0)
    after = patch_state(trainer.patch)
    state = trainer.engine.state()
    return {
        "moved_by": moved,
        "good": state_sha256_of(trainer, good),
        "restored": restored,
        "same_patch": trainer.peers.gather(all(torch.equal(after[name], patch[name]) for name in patch)),
        "same_masters": trainer.peers.gather(
            all(torch.equal(state.master[name], good.master[name]) for name in good.master)
        ),
        "with_moments": trainer.peers.gather(state_sha256(trainer.patch, state)),
        "reference": reference,
        "step": [good.step, state.step],
    }


def state_sha256_of(trainer: Trainer, state: Any) -> str:
    """The hash that a patch would have whose parameters are the state's masters."""

    class Stand:
        def state_dict(self) -> Any:
            return {**state.master, **dict(trainer.patch.named_buffers())}

    return state_sha256(Stand(), state)  # type: ignore[arg-type]


def losses(trainer: Trainer) -> dict[str, Any]:
    """The mean loss over ranks of every step, and what became of the base."""
    before = base_sha256(trainer.base)
    phase = trainer._begin(0, trainer.config.phases[0], 0)
    found, norms = [], []
    for step, batch in enumerate(batches_of(phase, 12), start=1):
        terms, _ = trainer.engine.train_step(batch, learning_rate(trainer.config.optimizer, step, 12))
        found.append(trainer.peers.mean_(terms).tolist())
        norm = trainer.engine.grad_norm()
        assert norm is not None
        norms.append(float(norm))
    return {
        "losses": found,
        "norms": norms,
        "base_unchanged": before == base_sha256(trainer.base),
        "base_has_grad": any(p.grad is not None or p.requires_grad for p in trainer.base.parameters()),
        "world": trainer.engine.world,
    }


READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::unique", "aten::masked_select")
"""Operations that make the host wait for a GPU, as they need a value or a size from it."""


def above(event: Any) -> list[str]:
    """The operation's name and those of the operations that it is a part of."""
    return [] if event is None else [event.name, *above(event.cpu_parent)]


def one_step(trainer: Trainer) -> dict[str, Any]:
    """Counts, in the profiler's record of one optimizer step, the bytes handed to collectives and the reads."""
    phase = trainer._begin(0, trainer.config.phases[0], 0)
    batches = batches_of(phase, 3)
    run_steps(trainer, batches[:2], 1e-3)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        trainer.meter.add(*trainer.engine.train_step(phase.batches.to_device(batches[2]), 1e-3))
    reads = [" < ".join(above(event)) for event in record.events() if event.name in READS]
    return {
        "moved": bytes_sent(record),
        "reads": reads,
        "parameters": sum(p.numel() for p in trainer.patch.parameters()),
    }


def disagreement(trainer: Trainer) -> dict[str, Any]:
    """Rank 1 corrupts what it loads."""
    phase = trainer._begin(0, trainer.config.phases[0], 0)
    run_steps(trainer, batches_of(phase, 2), 1e-3)
    good, load = trainer.engine.state(), trainer.engine.load

    def corrupting(state: Any) -> None:
        load(state)
        if trainer.peers.rank == 1:
            with torch.no_grad():
                next(trainer.patch.parameters()).view(-1)[0] += 1e-7

    trainer.engine.load = corrupting  # type: ignore[method-assign]
    restore_state(trainer.engine, trainer.patch, good, trainer.peers)
    return {}


def nonfinite(trainer: Trainer) -> dict[str, Any]:
    """On rank 1 alone, the loss of step 7 of the first phase is not a number."""
    step_of, calls = trainer.engine.train_step, [0]

    def poisoned(batches: Iterable[MicroBatch], rate: float) -> Any:
        calls[0] += 1
        terms, layers = step_of(batches, rate)
        if calls[0] == 7 and trainer.peers.rank == trainer.peers.world - 1:
            with torch.no_grad():
                for parameter in trainer.patch.parameters():
                    parameter.fill_(float("nan"))
            terms = terms * float("nan")
        return terms, layers

    trainer.engine.train_step = poisoned  # type: ignore[method-assign]
    trainer.run()
    return {"finite": all(bool(torch.isfinite(t).all()) for t in patch_state(trainer.patch).values())}


def another_world(trainer: Trainer) -> str:
    """The words of an engine that does not see the ranks which the launcher started."""
    world, trainer.peers.world = trainer.peers.world, 2 * trainer.peers.world
    objective = PatchObjective(trainer.base, trainer.patch, trainer.teacher, trainer.config.objective)
    try:
        make_engine(trainer.config, objective, trainer.peers)
    except RuntimeError as error:
        return str(error)
    finally:
        trainer.peers.world = world
    return ""


def poisoned_last_step(trainer: Trainer) -> dict[str, Any]:
    """The last step of the first phase leaves weights that are no numbers, while its loss is finite."""
    step_of, calls = trainer.engine.train_step, [0]

    def poisoned(batches: Iterable[MicroBatch], rate: float) -> Any:
        calls[0] += 1
        found = step_of(batches, rate)
        if calls[0] == 12:
            with torch.no_grad():
                next(trainer.patch.parameters()).fill_(float("nan"))
        return found

    trainer.engine.train_step = poisoned  # type: ignore[method-assign]
    trainer.run()
    return {}


def guarded(trainer: Trainer) -> dict[str, Any]:
    """The probe's losses are scripted: good, then worse and restored, then good; in the second phase always worse, and
    restored."""
    script = [5.0, 4.9, 5.4, 4.9, 4.8, 4.8] + [5.2, 4.8] * 5
    rates: list[float] = []
    step_of = trainer.engine.train_step

    def measure(*_: object) -> dict[str, Measurement]:
        level = script.pop(0)
        return {"probe": Measurement(np.full(8, level) + np.linspace(0, 1e-3, 8), [0.5], [0.1])}

    def stepping(batches: Iterable[MicroBatch], rate: float) -> Any:
        rates.append(rate)
        return step_of(batches, rate)

    trainer.watch.prober.measure = measure  # type: ignore[method-assign]
    trainer.engine.train_step = stepping  # type: ignore[method-assign]
    sampled: list[list[int]] = []
    cached: list[list[int]] = []
    keep_replay, return_to, cache = trainer._keep_replay, trainer._return_to, trainer.teacher.cache
    assert cache is not None

    def returning(*arguments: Any) -> None:
        before = len(cache)
        return_to(*arguments)
        cached.append([before, len(cache)])

    trainer._return_to = returning  # type: ignore[method-assign]

    def keeping(phase: Phase) -> None:
        sampled.append(list(phase.learned))
        keep_replay(phase)

    trainer._keep_replay = keeping  # type: ignore[method-assign]
    trainer.run()
    return {"rates": rates, "learned": sampled, "cached": cached, "patch": trainer.peers.gather(patch_sum(trainer))}


def patch_sum(trainer: Trainer) -> float:
    return float(sum(tensor.double().sum() for tensor in patch_state(trainer.patch).values()))


CHECKS: dict[str, Callable[[Trainer], dict[str, Any]]] = {
    check.__name__: check for check in (whole_engine, disagreement, nonfinite, poisoned_last_step, guarded)
}


def main(name: str, config_file: str, out: str, *overrides: str) -> None:
    config = load_config(config_file, overrides)
    launch = Launch.from_environment()
    plan = check(config, launch.world)
    torch.set_num_threads(1)
    with process_group(launch, launch.device(), config.engine.timeout_minutes) as peers:
        standing = startup.prepare_run(config, peers)
        record = Record(standing.directory, peers.rank == 0, config.monitoring.tensorboard)
        base = startup.load_frozen_base(config.base, peers.device)
        trainer = Trainer(config, plan, base, peers, record, standing.directory)
        trainer.begin_from(standing)
        found = CHECKS[name](trainer)
        record.close()
        if peers.rank == 0:
            Path(out).write_text(json.dumps(found))
