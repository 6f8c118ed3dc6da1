"""What TensorBoard shows of a real run: every term, rate, speed, layer, probe and event, at its steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained_run import STEPS, Run

from revpatch.config import Config
from revpatch.config.file import load_config
from revpatch.step.objective import TERMS


@pytest.fixture(scope="module")
def events(run: Run) -> Any:
    return events_in(run.directory / "tensorboard")


def events_in(folder: Path) -> Any:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def steps_of(config: Config) -> tuple[list[int], list[int]]:
    """The global steps at which a line is logged, and at which the probes are read."""
    logged, probed, before = [], [], 0
    for phase in config.phases:
        for step in range(1, phase.steps + 1):
            probe = step % config.probes.every == 0 or step == phase.steps
            if probe or step % config.monitoring.every == 0:
                logged.append(before + step)
            if probe:
                probed.append(before + step)
        before += phase.steps
    return logged, probed


def test_tensorboard_has_every_term_rate_speed_and_layer_at_every_logged_step(events: Any, run: Run) -> None:
    logged, _ = steps_of(load_config(run.config))
    tags = [f"loss/{term}" for term in TERMS]
    tags += ["optimizer/lr", "optimizer/grad_norm", "speed/tokens_per_second"]
    tags += [f"{key}/layer_{layer:02d}" for key in ("gate", "scale", "patch_norm") for layer in (0, 1)]
    for tag in tags:
        points = events.Scalars(tag)
        assert [point.step for point in points] == logged, tag
        assert all(point.value == point.value for point in points), tag
    assert all(0 < point.value < 1 for point in events.Scalars("gate/layer_00"))
    assert all(point.value > 0 for point in events.Scalars("scale/layer_01"))
    assert all(point.value > 0 for point in events.Scalars("speed/tokens_per_second"))


def test_tensorboard_shows_where_the_time_goes_and_how_often_the_teacher_was_not_asked(events: Any, run: Run) -> None:
    logged, probed = steps_of(load_config(run.config))
    each_line = ("step", "waiting_for_data", "forward", "backward", "all_reduce", "optimizer", "logging")
    expected = dict.fromkeys(each_line, logged) | {"probe": probed}
    for name, steps in expected.items():
        assert [point.step for point in events.Scalars(f"time/{name}")] == steps, name
    for name in ("snapshot", "samples"):
        assert {point.step for point in events.Scalars(f"time/{name}")} >= {STEPS["first"], sum(STEPS.values())}, name
    parts = sum(events.Scalars(f"time/{name}")[0].value for name in each_line[1:-1])
    assert 0 < parts < events.Scalars("time/step")[0].value
    rates = events.Scalars("teacher/cache_hit_rate")
    assert [point.step for point in rates] == logged
    assert 0 < max(rate.value for rate in rates) < 1


def test_tensorboard_has_the_objective_as_the_sum_of_its_terms(events: Any, run: Run) -> None:
    objective = load_config(run.config).objective.model_dump()
    weights = {"lm": 1.0, "replay_lm": objective["replay_loss_weight"]}
    weights |= {term: objective[f"{term}_weight"] for term in TERMS if term not in ("loss", "lm", "replay_lm")}
    for i, total in enumerate(events.Scalars("loss/loss")):
        parts = sum(weight * events.Scalars(f"loss/{term}")[i].value for term, weight in weights.items())
        assert total.value == pytest.approx(parts, rel=1e-4)


def test_tensorboard_has_the_numbers_of_the_log(events: Any, run: Run) -> None:
    lines = [line for line in run.result.out.splitlines() if re.match(r"\w+ \d+/\d+  loss ", line)]
    assert len(lines) == len(events.Scalars("loss/loss"))
    for tag in ("loss", "lm", "replay_lm", "distill_kl"):
        shown = [float(re.search(rf" {tag} (\S+)", line).group(1)) for line in lines]  # type: ignore[union-attr]
        assert [point.value for point in events.Scalars(f"loss/{tag}")] == pytest.approx(shown, rel=1e-3)


def test_tensorboard_has_the_learning_rate_of_the_phase(events: Any) -> None:
    rates = {point.step: point.value for point in events.Scalars("optimizer/lr")}
    assert rates[STEPS["first"]] == pytest.approx(0.0, abs=1e-9)
    assert rates[sum(STEPS.values())] == pytest.approx(0.0, abs=1e-9)
    assert rates[4] > rates[8] > rates[12] > 0
    assert rates[18] > rates[12], "each phase warms up anew"


def test_tensorboard_has_the_probes_and_the_commits(events: Any, run: Run) -> None:
    _, probed = steps_of(load_config(run.config))
    first = STEPS["first"]
    # Each phase shows the state that it begins with, its probes, and the state that it commits.
    second = [first, *(step for step in probed if step > first), probed[-1]]
    shown = [0, *(step for step in probed if step <= first), first, *second]
    beside = {
        name: events_in(run.directory / "tensorboard" / name) for name in ("phase_start", "limit", "commit_limit")
    }
    for name in ("base", "first", "second"):
        for value in ("loss", "gate", "phase_start", "sparsity", "patch_norm"):
            assert [point.step for point in beside.get(value, events).Scalars(f"probe/{name}/{value}")] == shown
    guarded = {"base": shown, "first": second}
    for name, steps in guarded.items():
        for value in ("reference", "limit", "commit_limit", "rise"):
            assert [point.step for point in beside.get(value, events).Scalars(f"probe/{name}/{value}")] == steps
    limits = beside["limit"]
    assert "probe/second/limit" not in limits.Tags()["scalars"], "no phase after it guards it"
    for loss, limit in zip(events.Scalars("probe/base/reference"), limits.Scalars("probe/base/limit"), strict=True):
        assert limit.value == pytest.approx(loss.value + 0.5, rel=1e-5)
    journal = [json.loads(line) for line in run.entry("journal.jsonl").read_text("utf-8").splitlines()]
    measured = [e for e in journal if e["event"] in ("probe", "commit") or e.get("kind") == "start"]
    losses = [event["sets"]["first"]["loss"] for event in measured]
    assert [p.value for p in events.Scalars("probe/first/loss")] == pytest.approx(losses, rel=1e-6)
    (tag,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("event/commit")]
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)}
    assert texts.keys() == {STEPS["first"], sum(STEPS.values())}
    assert "first committed" in texts[STEPS["first"]]
    # A vertical mark: three points, the last of which breaks the line, at rising steps, as some loaders want it.
    marks = events_in(run.directory / "tensorboard/commit").Scalars("mark/base/commit")
    assert [point.step for point in marks] == [step - before for step in texts for before in (2, 1, 0)]
