"""`base.compile`: the same numbers, whole graphs, and no compiling again from step to step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel

from revpatch.config import ObjectiveConfig, SidecarConfig
from revpatch.patch.patched_model import Patch, attach, recording
from revpatch.step.frozen_base import GateRecorder, last_hidden_states, make_lean
from revpatch.step.objective import PatchObjective
from revpatch.step.teacher import Teacher, TeacherCache
from revpatch.train import startup

LAYERS = 2


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small() -> tuple[nn.Module, Patch]:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=LAYERS, n_head=2, vocab_size=50, n_positions=16)).eval()
    patch = attach(base, SidecarConfig(bottleneck=4))
    for parameter in patch.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    make_lean(base)
    return base, patch


def steps(compiled: bool) -> tuple[list[float], list[Tensor]]:
    base, patch = small()
    if compiled:
        startup.compile_base(base, "aot_eager")
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


def test_a_run_is_whole_graphs_that_are_compiled_once() -> None:
    """Probes, steps with the teacher's cache, two commits: more graphs than torch keeps of one function."""
    graphs: Counter[str] = Counter()

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs["compiled"] += 1
        return module.forward

    base, patch = small()
    startup.compile_base(base, backend)
    teacher = Teacher(base, TeacherCache(10**6))
    objective = PatchObjective(base, patch, teacher, ObjectiveConfig(patch_l2_weight=0.1))
    batches = torch.randint(50, (6, 6, 16)).split(2)

    def probe(rows: int) -> None:
        with torch.no_grad(), recording(base, GateRecorder()):
            last_hidden_states(base, batches[0][0, :rows])

    def phase(batches: Tensor) -> None:
        for number, tokens in enumerate(batches):
            objective(tokens[:4], tokens[4:], [("a set", 2 * number), ("a set", 2 * number + 1)]).loss.backward()
        teacher.follow(patch)

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        probe(6)
        phase(batches[0])
        phase(batches[1])
        probe(6)
        probe(3)
        every = graphs["compiled"]
        phase(batches[2])
        probe(5)
    assert not counters["graph_break"], dict(counters["graph_break"])
    # The student; the teacher before and after the first commit; probes of full batches, and of any.
    assert every == graphs["compiled"] == 5 * LAYERS > torch._dynamo.config.recompile_limit


def test_compiled_steps_give_the_same_loss_and_gradients() -> None:
    (plain, gradients), (compiled, gradients_too) = steps(compiled=False), steps(compiled=True)
    assert compiled == pytest.approx(plain, rel=1e-6)
    for one, other in zip(gradients, gradients_too, strict=True):
        torch.testing.assert_close(one, other)
