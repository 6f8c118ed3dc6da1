"""The ways of doing it that bench.py compares, each written as its users would write it.

A peer has `step()`, one optimizer step on the workload's tokens, which returns the loss; `loss(new, replay)`, what that
step differentiates; `trainable()`, what learns; and `oracle_parts()`, the model and the teacher for the oracle.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_workload import BOTTLENECK, KL_WEIGHT, LEARNING_RATE, MAX_GRAD_NORM, REPLAY_WEIGHT, Workload
from torch import Tensor, nn

from revpatch.patch.patched_model import Patch, attach
from revpatch.training.lean import make_lean
from revpatch.training.objective import PatchObjective
from revpatch.training.schedule import make_optimizer, set_learning_rate
from revpatch.training.teacher import Teacher
from revpatch.training.teacher_cache import TeacherCache


class Parts(NamedTuple):
    """A model whose plain forward pass gives the student's logits, one that gives the teacher's, and what is in the
    objective."""

    student: Callable[[Tensor], Tensor]
    teacher: Callable[[Tensor], Tensor] | None
    replay: bool


class Peer:
    """The base of all: a workload, its tokens, a model, an optimizer."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.new, self.replay = workload.tokens()

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.student.parameters() if p.requires_grad]

    def loss(self, new: Tensor, replay: Tensor) -> Tensor:
        raise NotImplementedError

    def parts(self) -> Parts:
        raise NotImplementedError

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(self.new, self.replay)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable(), MAX_GRAD_NORM)
        self.optimizer.step()
        return loss.item()

    student: Any
    """The module that has what learns."""
    optimizer: Any


class Ours(Peer):
    """The step that the trainer makes, without the engine around it."""

    def __init__(self, workload: Workload, cached: bool = False) -> None:
        super().__init__(workload)
        self.base = workload.model(workload.dtype).eval().requires_grad_(False)
        self.student = self.patch = attach(self.base, workload.sidecar)
        spread(self.patch)
        make_lean(self.base)
        self.teacher = Teacher(self.base, TeacherCache(2**40) if cached else None)
        self.teacher.follow(self.patch)
        spread(self.patch, seed=2)
        self.objective = PatchObjective(self.base, self.patch, self.teacher, workload.objective)
        self.optimizer = make_optimizer(self.patch, workload.optimizer)
        set_learning_rate(self.optimizer, LEARNING_RATE)
        self.cached = cached

    def loss(self, new: Tensor, replay: Tensor) -> Tensor:
        keys = [(tuple(replay.shape), row) for row in range(len(replay))] if self.cached else None
        return self.objective(new, replay, keys).loss  # type: ignore[no-any-return]

    def parts(self) -> Parts:
        base = copy.deepcopy(self.base).double()
        student, teacher = _patched(base, self.patch, self.teacher)
        return Parts(student, teacher, replay=True)


def _patched(base: nn.Module, patch: Patch, teacher: Teacher) -> Any:
    """Student and teacher in float64; the gradients of the student's copy are those that are compared."""
    from revpatch.patch.patched_model import active_patch, switchboard

    board = switchboard(base)
    board.attached = board.active = student = copy.deepcopy(patch).double()
    other = None if teacher.patch is None else copy.deepcopy(teacher.patch).double()
    student.requires_grad_(True)

    def say(tokens: Tensor, who: Patch | None) -> Tensor:
        with active_patch(base, who):
            return base(tokens, use_cache=False).logits  # type: ignore[no-any-return]

    def of_student(tokens: Tensor) -> Tensor:
        return say(tokens, student)

    of_student.parameters = list(student.parameters())  # type: ignore[attr-defined]
    return of_student, lambda tokens: say(tokens, other)


class Textbook(Peer):
    """Full fine-tuning with replay, and a deep copy of the model as the teacher."""

    def __init__(self, workload: Workload, autocast: bool = False) -> None:
        super().__init__(workload)
        self.autocast = autocast
        self.student = workload.model()
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        spread(self.student, std=1e-3)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LEARNING_RATE)

    def loss(self, new: Tensor, replay: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            lm = cross_entropy(self.student(new, use_cache=False).logits, new)
            logits = self.student(replay, use_cache=False).logits
            with torch.no_grad():
                target = self.teacher(replay, use_cache=False).logits
            return lm + REPLAY_WEIGHT * cross_entropy(logits, replay) + KL_WEIGHT * kl_div(logits, target)

    def parts(self) -> Parts:
        student, teacher = copy.deepcopy(self.student).double(), copy.deepcopy(self.teacher).double()
        return Parts(logits_of(student), logits_of(teacher), replay=True)


class Lora(Peer):
    """PEFT's LoRA with about as many trainable parameters as our patch; with replay, the base alone is the teacher."""

    def __init__(self, workload: Workload, replay: bool) -> None:
        super().__init__(workload)
        from peft import LoraConfig, get_peft_model

        targets = ["c_attn", "c_fc", "attn.c_proj", "mlp.c_proj"]
        config = LoraConfig(r=lora_rank(workload), lora_alpha=16, target_modules=targets, fan_in_fan_out=True)
        self.student = get_peft_model(workload.model(workload.dtype), config)
        self.with_replay = replay
        spread(self.student, std=0.02)
        self.optimizer = torch.optim.AdamW(self.trainable(), lr=LEARNING_RATE)

    def loss(self, new: Tensor, replay: Tensor) -> Tensor:
        if not self.with_replay:
            return self.student(input_ids=new, labels=new).loss  # type: ignore[no-any-return]
        lm = self.student(input_ids=new, labels=new).loss
        out = self.student(input_ids=replay, labels=replay)
        with torch.no_grad(), self.student.disable_adapter():
            target = self.student(input_ids=replay).logits
        return lm + REPLAY_WEIGHT * out.loss + KL_WEIGHT * kl_div(out.logits, target)  # type: ignore[no-any-return]

    def parts(self) -> Parts:
        student = copy.deepcopy(self.student).double()

        def teacher(tokens: Tensor) -> Tensor:
            with student.disable_adapter():
                return student(input_ids=tokens).logits  # type: ignore[no-any-return]

        return Parts(logits_of(student), teacher if self.with_replay else None, self.with_replay)


class HfTrainer(Peer):
    """Full fine-tuning with the defaults of transformers' Trainer; LM alone."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        from transformers import Trainer, TrainingArguments

        self.student = workload.model()
        self.folder = tempfile.TemporaryDirectory()
        arguments = TrainingArguments(self.folder.name, report_to=[], use_cpu=True, disable_tqdm=True)
        self.trainer = Trainer(self.student, arguments)
        self.optimizer = self.trainer.create_optimizer()
        self.trainer.create_scheduler(1000, self.optimizer)
        self.trainer.current_gradient_accumulation_steps = 1  # as its training loop sets it
        self.arguments = arguments

    def loss(self, new: Tensor, replay: Tensor) -> Tensor:
        return self.student(input_ids=new, labels=new).loss  # type: ignore[no-any-return]

    def step(self) -> float:
        """What its training loop does around `training_step`."""
        loss = self.trainer.training_step(self.student, {"input_ids": self.new, "labels": self.new})
        self.trainer.accelerator.clip_grad_norm_(self.student.parameters(), self.arguments.max_grad_norm)
        self.optimizer.step()
        self.trainer.lr_scheduler.step()
        self.student.zero_grad()
        return float(loss)

    def parts(self) -> Parts:
        return Parts(logits_of(copy.deepcopy(self.student).double()), None, replay=False)


PEERS: dict[str, Callable[[Workload], Peer]] = {
    "ours": Ours,
    "ours-cached": lambda workload: Ours(workload, cached=True),
    "textbook-fp32": Textbook,
    "textbook-bf16": lambda workload: Textbook(workload, autocast=True),
    "lora-kl": lambda workload: Lora(workload, replay=True),
    "lora-lm": lambda workload: Lora(workload, replay=False),
    "full-lm": HfTrainer,
}


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def kl_div(logits: Tensor, target: Tensor) -> Tensor:
    """KL(teacher ‖ student), nats per token."""
    ours, theirs = (F.log_softmax(x[:, :-1].flatten(0, 1), dim=-1) for x in (logits, target))
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    def say(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]

    say.parameters = [p for p in model.parameters() if p.requires_grad]  # type: ignore[attr-defined]
    return say


def spread(model: nn.Module, std: float = 0.02, seed: int = 1) -> None:
    """Moves what learns away from where it starts: zero gates, zero last layers and a student that is its teacher would
    hide a wrong gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * std).to(parameter.dtype))


def lora_rank(workload: Workload) -> int:
    """The rank with which LoRA on all four projections has about as many parameters as our patch."""
    d = int(workload.config().n_embd)
    r: int = BOTTLENECK[workload.shape]
    ours = 2 * (2 * (d // 2) * r + r + d // 2) + d + 2
    return max(1, round(ours / ((d + 3 * d) + (d + d) + (d + 4 * d) + (4 * d + d))))
