"""What TensorBoard shows of a real run: every term, rate, speed, layer, probe and event, at its steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained_run import STEPS, Run

from revpatch.config.file import load_config
from revpatch.step.objective import TERMS

FIRST, ALL = STEPS["first"], sum(STEPS.values())


def events_in(folder: Path) -> Any:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def events(run: Run) -> Any:
    return events_in(run.directory / "tensorboard")


@pytest.fixture(scope="module")
def steps(run: Run) -> dict[str, list[int]]:
    """The global steps at which a line is logged and the probes are read, and those that a probe's chart has: each
    phase shows the state that it begins with, its probes, and the state that it commits."""
    config, before = load_config(run.config), 0
    found: dict[str, list[int]] = {"logged": [], "probed": [], "shown": [], "second": []}
    for phase in config.phases:
        own = range(1, phase.steps + 1)
        probed = [before + step for step in own if step % config.probes.every == 0 or step == phase.steps]
        found["logged"] += [
            s for s in range(before + 1, before + phase.steps + 1) if s in probed or (s - before) % 4 == 0
        ]
        found["probed"] += probed
        found["shown"] += [before, *probed, before + phase.steps]
        found["second"] = [before, *probed, before + phase.steps]
        before += phase.steps
    assert config.monitoring.every == 4
    return found


def test_every_chart_has_its_points_at_its_steps(events: Any, run: Run, steps: dict[str, list[int]]) -> None:
    logged = [*(f"loss/{term}" for term in TERMS), "optimizer/lr", "optimizer/grad_norm", "speed/tokens_per_second"]
    logged += [f"{key}/layer_{layer:02d}" for key in ("gate", "scale", "patch_norm") for layer in (0, 1)]
    logged += [f"time/{name}" for name in ("step", "waiting_for_data", "forward", "backward", "optimizer", "logging")]
    tags = dict.fromkeys([*logged, "teacher/cache_hit_rate"], "logged") | {"time/probe": "probed"}
    for name in ("base", "first", "second"):
        tags |= dict.fromkeys((f"probe/{name}/{key}" for key in ("loss", "gate", "sparsity", "patch_norm")), "shown")
    for name, when in (("base", "shown"), ("first", "second")):  # from when on it is guarded
        tags |= dict.fromkeys((f"probe/{name}/{key}" for key in ("reference", "rise")), when)
    for tag, when in tags.items():
        points = events.Scalars(tag)
        assert [point.step for point in points] == steps[when], tag
        assert all(point.value == point.value for point in points), tag
    limits = events_in(run.directory / "tensorboard/limit")
    assert "probe/second/limit" not in limits.Tags()["scalars"], "no phase after it guards it"
    for loss, limit in zip(events.Scalars("probe/base/reference"), limits.Scalars("probe/base/limit"), strict=True):
        assert limit.value == pytest.approx(loss.value + 0.5, rel=1e-5)
    assert 0 < max(rate.value for rate in events.Scalars("teacher/cache_hit_rate")) < 1


def test_the_numbers_are_those_of_the_log_and_the_journal(events: Any, run: Run) -> None:
    lines = [line for line in run.result.out.splitlines() if re.match(r"\w+ \d+/\d+  loss ", line)]
    for tag in ("loss", "lm", "replay_lm", "distill_kl"):
        shown = [float(re.search(rf" {tag} (\S+)", line).group(1)) for line in lines]  # type: ignore[union-attr]
        assert [point.value for point in events.Scalars(f"loss/{tag}")] == pytest.approx(shown, rel=1e-3)
    objective = load_config(run.config).objective.model_dump()
    weights = {"lm": 1.0, "replay_lm": objective["replay_loss_weight"]}
    weights |= {term: objective[f"{term}_weight"] for term in TERMS if term not in ("loss", "lm", "replay_lm")}
    for i, total in enumerate(events.Scalars("loss/loss")):
        parts = sum(weight * events.Scalars(f"loss/{term}")[i].value for term, weight in weights.items())
        assert total.value == pytest.approx(parts, rel=1e-4), "the objective is the sum of its terms"
    rates = {point.step: point.value for point in events.Scalars("optimizer/lr")}
    assert rates[FIRST] == pytest.approx(0.0, abs=1e-9) and rates[ALL] == pytest.approx(0.0, abs=1e-9)
    assert rates[4] > rates[8] > rates[12] > 0 and rates[18] > rates[12], "each phase warms up anew"
    journal = [json.loads(line) for line in run.entry("journal.jsonl").read_text("utf-8").splitlines()]
    measured = [e for e in journal if e["event"] in ("probe", "commit") or e.get("kind") == "start"]
    losses = [event["sets"]["first"]["loss"] for event in measured]
    assert [p.value for p in events.Scalars("probe/first/loss")] == pytest.approx(losses, rel=1e-6)


def test_a_commit_is_a_text_and_a_mark(events: Any, run: Run) -> None:
    (tag,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("event/commit")]
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)}
    assert texts.keys() == {FIRST, ALL} and "first committed" in texts[FIRST]
    # Three points, the last of which breaks the line, at rising steps, as some loaders want it.
    marks = events_in(run.directory / "tensorboard/commit").Scalars("mark/base/commit")
    assert [point.step for point in marks] == [step - before for step in texts for before in (2, 1, 0)]
