"""Our step as bench.py times it, and what every way of doing it has in common.

A peer has `step()`, one optimizer step on the workload's tokens, which returns the loss; `backward(new, replay)`, which
gives the gradients of that step; `trainable()`, what learns; and `parts()`, the model and the teacher for the oracle.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from bench_workload import KL_WEIGHT, LEARNING_RATE, MAX_GRAD_NORM, REPLAY_WEIGHT, Workload
from torch import Tensor, nn

from revpatch.config import TeacherConfig
from revpatch.distributed.ranks import Ranks
from revpatch.monitoring.record import RunningMean
from revpatch.patch.families import blocks_of
from revpatch.patch.patched_model import Patch, active_patch, attach, switchboard
from revpatch.step.engine import Engine, MicroBatch, make_engine, make_optimizer, set_learning_rate
from revpatch.step.frozen_base import make_lean
from revpatch.step.head_loss import compiled, in_place
from revpatch.step.objective import PatchObjective
from revpatch.step.teacher import Key, Teacher, TeacherCache
from revpatch.train.startup import compile_base

CACHE_BYTES = int(TeacherConfig().cache_gb * 1e9)
"""What a run's teacher may keep if its config doesn't say otherwise."""


class Parts(NamedTuple):
    """A model whose plain forward pass gives the student's logits, one that gives the teacher's, and what is in the
    objective."""

    student: Callable[[Tensor], Tensor]
    teacher: Callable[[Tensor], Tensor] | None
    replay: bool


class Peer:
    """The base of all: a workload, its tokens, a model, an optimizer."""

    student: Any
    """The module that has what learns."""
    optimizer: Any

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        self.workload = workload
        self.new, self.replay = workload.tokens()
        self.dtype = dtype
        """In which it multiplies: how exact it has to be."""
        self.replay_weight, self.kl_weight = REPLAY_WEIGHT, KL_WEIGHT

    def weigh(self, replay: float, kl: float) -> None:
        """Gives the terms other weights."""
        self.replay_weight, self.kl_weight = replay, kl

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.student.parameters() if p.requires_grad]

    def loss(self, new: Tensor, replay: Tensor) -> Tensor:
        raise NotImplementedError

    def backward(self, new: Tensor, replay: Tensor) -> Tensor:
        """Adds the gradients of the loss, and returns it, on the device: to read it would make the host wait."""
        loss = self.loss(new, replay)
        loss.backward()
        return loss.detach()

    def parts(self) -> Parts:
        raise NotImplementedError

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.backward(self.new, self.replay)
        torch.nn.utils.clip_grad_norm_(self.trainable(), MAX_GRAD_NORM)
        self.optimizer.step()
        return loss


class Ours(Peer):
    """The step that the trainer makes, micro-batch by micro-batch, without the engine around it."""

    def __init__(self, workload: Workload, cached: bool = False, checkpointing: bool = False) -> None:
        super().__init__(workload, workload.dtype)
        self.base = workload.model(workload.dtype).eval().requires_grad_(False)
        self.student = self.patch = attach(self.base, workload.sidecar)
        switchboard(self.base).checkpointing = checkpointing
        spread(self.patch)
        make_lean(self.base)
        if workload.backend is not None:
            compile_base(self.base, workload.backend)
        self.teacher = Teacher(self.base, TeacherCache(CACHE_BYTES) if cached else None)
        self.teacher.follow(self.patch)
        spread(self.patch, seed=2)
        chunk = in_place if workload.backend is None else compiled(workload.backend)
        self.objective = PatchObjective(self.base, self.patch, self.teacher, workload.objective, chunk)
        self.optimizer = make_optimizer(self.patch, workload.optimizer)
        set_learning_rate(self.optimizer, LEARNING_RATE)
        self.cached = cached
        self.keys = keys_of(self.replay) if cached else None

    def weigh(self, replay: float, kl: float) -> None:
        super().weigh(replay, kl)
        weights = {"replay_loss_weight": replay, "distill_kl_weight": kl}
        self.objective.config = self.objective.config.model_copy(update=weights)

    def backward(self, new: Tensor, replay: Tensor) -> Tensor:
        total = torch.zeros((), device=new.device)
        for loss in self.losses(new, replay):
            loss.backward()
            total += loss.detach()
        return total

    def losses(self, new: Tensor, replay: Tensor) -> Iterator[Tensor]:
        """Of the micro-batches, one after the other; their sum is the step's."""
        count = math.gcd(self.workload.accumulation, len(new), len(replay))
        keys = self.keys if replay is self.replay else keys_of(replay) if self.cached else None
        each = len(replay) // count
        for number, (some, again) in enumerate(zip(new.chunk(count), replay.chunk(count), strict=True)):
            own = None if keys is None else keys[number * each : (number + 1) * each]
            yield self.objective(some, again, own).loss / count

    def parts(self) -> Parts:
        base = copy.deepcopy(self.base).double()
        for block in blocks_of(base):
            vars(block).pop("forward", None)  # a compiled one would run the blocks that were copied, not the copies
        student, teacher = _patched(base, self.patch, self.teacher)
        return Parts(student, teacher, replay=True)


class OursFilling(Ours):
    """Ours in the steps that fill the cache: nothing that is asked of it is there."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, cached=True)

    def step(self) -> Tensor:
        self.teacher.forget()
        return super().step()


def _patched(base: nn.Module, patch: Patch, teacher: Teacher) -> Any:
    """Student and teacher in float64; the gradients of the student's copy are those that are compared."""
    board = switchboard(base)
    student = copy.deepcopy(patch).double()
    board.attached, board.choice = student, board.choice._replace(patch=student)
    other = None if teacher.patch is None else copy.deepcopy(teacher.patch).double()
    student.requires_grad_(True)

    def say(tokens: Tensor, who: Patch | None) -> Tensor:
        with active_patch(base, who):
            return base(tokens, use_cache=False).logits  # type: ignore[no-any-return]

    def of_student(tokens: Tensor) -> Tensor:
        return say(tokens, student)

    of_student.parameters = list(student.parameters())  # type: ignore[attr-defined]
    return of_student, lambda tokens: say(tokens, other)


def trainers_step(ours: Ours, kind: str, peers: Ranks) -> tuple[Engine, Callable[[], Tensor]]:
    """Return the trainer's engine around the objective of `ours`, and one whole step with it, as the trainer makes it.

    The step takes its tokens from CPU memory, pinned for a GPU, and adds what it gives to the sums of the log, which it
    returns: on the device, so that nothing waits.
    """
    workload = ours.workload
    engine, meter = make_engine(workload.run_config(kind, peers.world), ours.objective, peers), RunningMean()
    count = workload.accumulation
    each = workload.replay // count
    rows = [ours.new.cpu(), ours.replay.cpu()]
    new, replay = (tokens.pin_memory() if workload.device == "cuda" else tokens for tokens in rows)
    parts = list(zip(new.chunk(count), replay.chunk(count), strict=True))
    keys = [None if ours.keys is None else ours.keys[n * each : (n + 1) * each] for n in range(count)]

    def step() -> Tensor:
        batches = [
            MicroBatch(new.to(peers.device, non_blocking=True), replay.to(peers.device, non_blocking=True), own)
            for (new, replay), own in zip(parts, keys, strict=True)
        ]
        meter.add(*engine.train_step(batches, LEARNING_RATE))
        assert meter._sum is not None
        return meter._sum

    return engine, step


def keys_of(replay: Tensor) -> Sequence[Key]:
    """Return what the teacher's cache knows each block by, a set of its own each; reads the blocks from the device."""
    return [(row.numpy().tobytes(), 0) for row in replay.cpu()]


def spread(model: nn.Module, std: float = 0.02, seed: int = 1) -> None:
    """Moves what learns away from where it starts: zero gates, zero last layers and a student that is its teacher would
    hide a wrong gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * std).to(parameter))
