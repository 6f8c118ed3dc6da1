"""`base.compile`: the same numbers, whole graphs, and no compiling again from step to step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel

from revpatch.config import ObjectiveConfig, SidecarConfig
from revpatch.patch.patched_model import attach
from revpatch.training import startup
from revpatch.training.lean import make_lean
from revpatch.training.objective import PatchObjective
from revpatch.training.teacher import Teacher

LAYERS = 3


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def steps(compiled: bool, backend: Any = "aot_eager") -> tuple[list[float], list[Tensor]]:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=LAYERS, n_head=2, vocab_size=50, n_positions=16)).eval()
    patch = attach(base, SidecarConfig(bottleneck=4))
    for parameter in patch.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    make_lean(base)
    if compiled:
        startup.compile_base(base, backend)
    teacher = Teacher(base)
    teacher.follow(patch)
    objective = PatchObjective(base, patch, teacher, ObjectiveConfig(patch_l2_weight=0.1, stats_drift_weight=0.1))
    tokens = torch.randint(50, (4, 6, 16))
    found = []
    for step in tokens:
        output = objective(step[:4], step[4:])
        output.loss.backward()
        found.append(output.loss.item())
    return found, [p.grad.clone() for p in patch.parameters() if p.grad is not None]


def test_compiled_steps_are_whole_graphs_that_are_compiled_once() -> None:
    graphs: Counter[str] = Counter()

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs["compiled"] += 1
        return module.forward

    steps(compiled=True, backend=backend)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert graphs["compiled"] <= 2 * LAYERS, "one for the student, one for the teacher, which has no gradients"


def test_compiled_steps_give_the_same_loss_and_gradients() -> None:
    (plain, gradients), (compiled, gradients_too) = steps(compiled=False), steps(compiled=True)
    assert compiled == pytest.approx(plain, rel=1e-6)
    for one, other in zip(gradients, gradients_too, strict=True):
        torch.testing.assert_close(one, other)
