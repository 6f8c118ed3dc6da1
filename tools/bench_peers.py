"""The ways of doing it that bench.py compares with ours, each written as its users would write it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_ours import Ours, OursFilling, Parts, Peer, spread
from bench_workload import BOTTLENECK, LEARNING_RATE, Workload
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments


class Textbook(Peer):
    """Full fine-tuning with replay, and a deep copy of the model as the teacher."""

    def __init__(self, workload: Workload, autocast: bool = False) -> None:
        super().__init__(workload, torch.bfloat16 if autocast else torch.float32)
        self.autocast = autocast
        self.student = workload.model()
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        spread(self.student, std=1e-3)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LEARNING_RATE)

    def loss(self, new: Tensor, replay: Tensor) -> Tensor:
        with torch.autocast(self.workload.device, torch.bfloat16, enabled=self.autocast):
            lm = cross_entropy(self.student(new, use_cache=False).logits, new)
            logits = self.student(replay, use_cache=False).logits
            with torch.no_grad():
                target = self.teacher(replay, use_cache=False).logits
            return lm + self.replay_weight * cross_entropy(logits, replay) + self.kl_weight * kl_div(logits, target)

    def parts(self) -> Parts:
        student, teacher = copy.deepcopy(self.student).double(), copy.deepcopy(self.teacher).double()
        return Parts(logits_of(student), logits_of(teacher), replay=True)


class Lora(Peer):
    """PEFT's LoRA with about as many trainable parameters as our patch; with replay, the base alone is the teacher."""

    def __init__(self, workload: Workload, replay: bool) -> None:
        super().__init__(workload, workload.dtype)
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
        kl = kl_div(out.logits, target)
        return lm + self.replay_weight * out.loss + self.kl_weight * kl  # type: ignore[no-any-return]

    def parts(self) -> Parts:
        student = copy.deepcopy(self.student).double()

        def teacher(tokens: Tensor) -> Tensor:
            with student.disable_adapter():
                return student(input_ids=tokens).logits  # type: ignore[no-any-return]

        return Parts(logits_of(student), teacher if self.with_replay else None, self.with_replay)


class HfTrainer(Peer):
    """Full fine-tuning with the defaults of transformers' Trainer; LM alone."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, torch.float32)
        self.student = workload.model()
        self.folder = tempfile.TemporaryDirectory()
        on_cpu = workload.device == "cpu"
        arguments = TrainingArguments(self.folder.name, report_to=[], use_cpu=on_cpu, disable_tqdm=True)
        self.trainer = Trainer(self.student, arguments)
        self.optimizer = self.trainer.create_optimizer()
        self.trainer.create_scheduler(1000, self.optimizer)
        self.trainer.current_gradient_accumulation_steps = 1  # as its training loop sets it
        self.arguments = arguments

    def backward(self, new: Tensor, replay: Tensor) -> Tensor:
        loss: Tensor = self.trainer.training_step(self.student, {"input_ids": new, "labels": new})
        return loss.detach()

    def step(self) -> Tensor:
        """What its training loop does around `training_step`."""
        loss = self.backward(self.new, self.replay)
        self.trainer.accelerator.clip_grad_norm_(self.student.parameters(), self.arguments.max_grad_norm)
        self.optimizer.step()
        self.trainer.lr_scheduler.step()
        self.student.zero_grad()
        return loss

    def parts(self) -> Parts:
        return Parts(logits_of(copy.deepcopy(self.student).double()), None, replay=False)


PEERS: dict[str, Callable[[Workload], Peer]] = {
    "ours": Ours,
    "ours-cached": lambda workload: Ours(workload, cached=True),
    "ours-filling": OursFilling,
    "ours-checkpointing": lambda workload: Ours(workload, checkpointing=True),
    "textbook-fp32": Textbook,
    "textbook-bf16": lambda workload: Textbook(workload, autocast=True),
    "lora-kl": lambda workload: Lora(workload, replay=True),
    "lora-lm": lambda workload: Lora(workload, replay=False),
    "full-lm": HfTrainer,
}
ALWAYS = ("ours", "ours-cached", "ours-filling")


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


def lora_rank(workload: Workload) -> int:
    """The rank with which LoRA on all four projections has about as many parameters as our patch."""
    d = int(workload.config().n_embd)
    r: int = BOTTLENECK[workload.shape]
    ours = 2 * (2 * (d // 2) * r + r + d // 2) + d + 2
    return max(1, round(ours / ((d + 3 * d) + (d + d) + (d + 4 * d) + (4 * d + d))))
