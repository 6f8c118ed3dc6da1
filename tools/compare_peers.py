"""The other ways to teach a model, each through its own library as its users call it, on the same blocks as ours."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_measure import ATTENTION
from compare_cells import Cell
from compare_data import Course, config_of
from compare_tiers import Tier
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from revpatch.base import load_base
from revpatch.config import Config
from revpatch.patch.families import blocks_of, body_of, head_of
from revpatch.patch.sidecar import Patch
from revpatch.step.engine import EPS, learning_rate
from revpatch.step.frozen_base import last_hidden_states
from revpatch.step.head_loss import frozen_head_loss, token_nll

Losses = dict[str, NDArray[np.float64]]


class Student:
    """A model that learns, and how it is saved.

    Args:
        model: the Hugging Face model, with the adapter's layers in it.
        adapter: the library's model around it; None where the model's own weights learn.
    """

    def __init__(self, model: nn.Module, adapter: Any = None) -> None:
        self.model, self.adapter = model.eval(), adapter

    def hidden(self, tokens: Tensor) -> Tensor:
        """The last hidden states of full blocks, (rows, time) int64 to (rows, time, d)."""
        return last_hidden_states(self.model, tokens)

    @property
    def learns(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        whole = self.model if self.adapter is None else self.adapter
        return [parameter for parameter in whole.parameters() if parameter.requires_grad]

    @property
    def head_learns(self) -> bool:
        """Whether the head is among them."""
        return head_of(self.model).weight.requires_grad

    def shipped(self) -> int:
        """Bytes of what a user would hand on."""
        with tempfile.TemporaryDirectory() as folder:
            saved: Any = self.model if self.adapter is None else self.adapter
            saved.save_pretrained(folder)
            return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


class ShadowStudent(Student):
    """One whose adapter begins in the whole model's forward pass, so that its body alone is not enough."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """As `Student.hidden`; the logits that the pass makes are not used."""
        states: list[Tensor] = []
        hook = body_of(self.model).register_forward_hook(lambda _, __, output: states.append(output[0]))
        try:
            self.adapter(input_ids=tokens, use_cache=False)
        finally:
            hook.remove()
        return states[0]


def trainable_of_ours(model: nn.Module, config: Config) -> int:
    """Parameters of our patch on this base."""
    architecture: Any = model.config
    patch = Patch(architecture.hidden_size, architecture.num_hidden_layers, config.sidecar)
    return sum(parameter.numel() for parameter in patch.parameters())


def full(model: nn.Module, config: Config) -> Student:
    """Every weight of the base learns."""
    return Student(model.requires_grad_(True))


def lora(model: nn.Module, config: Config) -> Student:
    """LoRA on all linear layers, of a rank with which about as much is trained as in our patch."""
    from peft import LoraConfig, get_peft_model

    def adapted(base: nn.Module, rank: int) -> Any:
        settings = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return get_peft_model(base, settings)

    with torch.random.fork_rng():
        one = adapted(copy.deepcopy(model), 1)
    of_rank_one = sum(parameter.numel() for parameter in one.parameters() if parameter.requires_grad)
    wrapped = adapted(model, max(1, round(trainable_of_ours(model, config) / of_rank_one)))
    return Student(wrapped.get_base_model(), wrapped)


def oft(model: nn.Module, config: Config) -> Student:
    """OFT on all linear layers, with blocks of the size that trains most nearly as much as our patch."""
    from peft import OFTConfig, get_peft_model

    wanted = trainable_of_ours(model, config)
    widths = [_inputs(module) for module in _linear(model)]
    fitting = [size for size in range(2, 129) if all(width % size == 0 for width in widths)]
    size = min(fitting, key=lambda size: abs(sum(width * (size - 1) // 2 for width in widths) - wanted))
    settings = OFTConfig(
        r=0, oft_block_size=size, module_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, settings)
    return Student(wrapped.get_base_model(), wrapped)


def osf(model: nn.Module, config: Config) -> Student:
    """OSF on all linear layers, at its defaults: half of the singular directions are kept, half learn."""
    from peft import OSFConfig, get_peft_model

    wrapped = get_peft_model(model, OSFConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    return Student(wrapped.get_base_model(), wrapped)


def shadow(model: nn.Module, config: Config) -> Student:
    """ShadowPEFT at its defaults, without dropout."""
    from peft import ShadowConfig, get_peft_model

    wrapped = get_peft_model(model, ShadowConfig(shadow_dropout=0.0, task_type="CAUSAL_LM"))
    wrapped.eval()
    return ShadowStudent(wrapped.get_base_model(), wrapped)


def _linear(model: nn.Module) -> list[nn.Module]:
    """The linear layers of the blocks, GPT-2's own kind among them."""
    return [module for module in blocks_of(model).modules() if isinstance(module, nn.Linear | Conv1D)]


def _inputs(layer: nn.Module) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0])  # type: ignore[union-attr, index, arg-type]


PEERS: dict[str, Callable[[nn.Module, Config], Student]] = {
    "full": full,
    "lora": lora,
    "oft": oft,
    "osf": osf,
    "shadow": shadow,
}
"""By family."""


def make_student(cell: Cell, config: Config) -> Student:
    """The peer of a cell before its first step."""
    torch.manual_seed(cell.seed)
    base = load_base(config.base.model, None, torch.float32).requires_grad_(False)
    return PEERS[cell.family](base, config)


def frozen(student: Student) -> Student:
    """A copy of the student as it is now."""
    copied = copy.deepcopy(student)
    for parameter in copied.learns:
        parameter.requires_grad_(False)
    return copied


class Teacher:
    """The student as it was when a phase began and, for what the base wrote or knew, as it was before the first one, as
    ours has it; what it says of a block is computed once a phase."""

    def __init__(self, student: Student, first: Student, base_set: str) -> None:
        self.student, self.first, self.base_set = frozen(student), first, base_set
        self.said: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def hidden(self, tokens: Tensor, keys: Sequence[tuple[str, int]]) -> Tensor:
        """Its last hidden states of these blocks, (rows, time, d)."""
        missing = [row for row, key in enumerate(keys) if key not in self.said]
        if missing:
            for row in missing:
                answers = self.first if keys[row][0] == self.base_set else self.student
                self.said[keys[row]] = answers.hidden(tokens[[row]])[0]
        return torch.stack([self.said[key] for key in keys])


def loss_of(
    student: Student,
    teacher: Teacher | None,
    new: Tensor,
    replay: Tensor | None,
    keys: Sequence[tuple[str, int]],
    kl_weight: float,
) -> Tensor:
    """LM(new) + LM(replay) + kl_weight·KL(teacher ‖ student on replay), nats per token, as our objective has it."""
    tokens = new if replay is None else torch.cat([new, replay])
    hidden, count = student.hidden(tokens), len(new)
    taught = None if teacher is None or replay is None else _flat(teacher.hidden(replay, keys))
    head = head_of(student.model).weight
    if not student.head_learns:
        loss: Tensor = frozen_head_loss(_flat(hidden[:count]), _targets(new), head)[0]
        if replay is not None:
            weight = 0.0 if taught is None else kl_weight
            states, targets = _flat(hidden[count:]), _targets(replay)
            loss = loss + frozen_head_loss(states, targets, head, taught, kl_weight=weight)[0]
        return loss
    loss = F.cross_entropy(F.linear(_flat(hidden[:count]), head), _targets(new))
    if replay is not None:
        logits = F.linear(_flat(hidden[count:]), head)
        loss = loss + F.cross_entropy(logits, _targets(replay))
        if teacher is not None and taught is not None:
            target = F.log_softmax(F.linear(taught, head_of(teacher.student.model).weight), dim=-1)
            kl = F.kl_div(F.log_softmax(logits, dim=-1), target, log_target=True, reduction="batchmean")
            loss = loss + kl_weight * kl
    return loss


def _flat(hidden: Tensor) -> Tensor:
    return hidden[:, :-1].reshape(-1, hidden.shape[-1])


def _targets(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].reshape(-1)


@torch.no_grad()
def measure(student: Student, sets: dict[str, NDArray[Any]], rows: int) -> Losses:
    """Mean nats per predicted token of each block of each set, (blocks,)."""
    head, found = head_of(student.model).weight, {}
    for name, blocks in sets.items():
        parts = []
        for start in range(0, len(blocks), rows):
            tokens = torch.from_numpy(blocks[start : start + rows].astype(np.int64))
            nll = token_nll(_flat(student.hidden(tokens)), _targets(tokens), head)
            parts.append(nll.view(len(tokens), -1).double().mean(1))
        found[name] = torch.cat(parts).numpy()
    return found


def check_of(phase: int, step: int, losses: Losses, ends: bool) -> dict[str, Any]:
    """A measurement as the store keeps it; block by block where a phase ends."""
    found: dict[str, Any] = {"phase": phase, "step": step}
    found["losses"] = {name: round(float(values.mean()), 6) for name, values in losses.items()}
    if ends:
        found["blocks"] = {name: [round(float(value), 5) for value in values] for name, values in losses.items()}
    return found


def run_peer(tier: Tier, cell: Cell) -> dict[str, Any]:
    """Trains and measures a peer.

    Raises FloatingPointError when a loss is no number.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(tier, cell, Path(folder) / "run")
        course = Course(config, Path(folder) / "replay")
        student = make_student(cell, config)
        untaught = frozen(student) if cell.distils else None
        sets, rows = course.held_out(student.model), 2 * config.batch.micro_blocks
        checks = [check_of(0, 0, measure(student, sets, rows), ends=True)]
        kl_weight, seconds = config.objective.distill_kl_weight, list[float]()
        flops = 0
        for index, phase in enumerate(config.phases):
            teacher = None
            if untaught is not None:
                teacher = Teacher(student, untaught, course.replayed[0].manifest.digest)
            first, second = config.optimizer.betas
            optimizer = torch.optim.AdamW(student.learns, betas=(first, second), eps=EPS, weight_decay=0.0)
            for step, (new, replay, keys) in enumerate(course.steps(index), start=1):
                if not flops:
                    flops = _flops(student, teacher, new, replay, keys, kl_weight)
                began = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config.optimizer, step, phase.steps)
                loss = loss_of(student, teacher, new, replay, keys, kl_weight)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(student.learns, config.optimizer.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(time.perf_counter() - began)
                if not math.isfinite(value := loss.item()):
                    raise FloatingPointError(f"{cell.name}: the loss of step {step} of {phase.name} is {value}")
                if step % config.probes.every == 0 or step == phase.steps:
                    losses = measure(student, sets, rows)
                    checks.append(check_of(index, step, losses, ends=step == phase.steps))
        return {
            "checks": checks,
            "seconds_a_step": round(statistics.median(seconds), 4),
            "trainable": sum(parameter.numel() for parameter in student.learns),
            "bytes": student.shipped(),
            "flops_a_new_token": round(flops / (config.batch.new_blocks * tier.block)),
        }


def _flops(
    student: Student,
    teacher: Teacher | None,
    new: Tensor,
    replay: Tensor | None,
    keys: Sequence[tuple[str, int]],
    kl_weight: float,
) -> int:
    """Counted operations of a step whose replayed blocks the teacher has been asked about before."""
    with torch.no_grad():
        loss_of(student, teacher, new, replay, keys, kl_weight)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        loss_of(student, teacher, new, replay, keys, kl_weight).backward()
    for parameter in student.learns:
        parameter.grad = None
    return int(counter.get_total_flops())
