"""Runs that go on with another number of ranks, another engine or another ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import Runs, RunServer
from toy import Toy

from revpatch.ledger.ledger import Ledger


def losses(run: Path) -> dict[int, float]:
    """loss by step of the run, from TensorBoard's files, as they count after a purge."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {scalar.step: scalar.value for scalar in events.Scalars("loss/loss")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "stage", "other_world", "other_stage"),
    [(2, 0, 1, 0), (2, 0, 4, 2), (1, 1, 2, 1), (2, 2, 2, None), (2, 1, 2, 0)],
    ids=str,
)
def test_another_world_or_zero_stage_goes_on_with_the_same_losses(
    toy: Toy, server: RunServer, tmp_path: Path, world: int, stage: int, other_world: int, other_stage: int | None
) -> None:
    def engine(stage: int | None) -> list[str]:
        if stage is None:
            return ["--set", "engine.kind=accelerate", "--set", "engine.deepspeed=null"]
        zero = tmp_path / f"zero{stage}.json"
        zero.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        return ["--set", "engine.kind=deepspeed", "--set", f"engine.deepspeed={zero}"]

    config = toy.config_file(
        tmp_path,
        phases=[{"name": "first", "shards": str(toy.shards("first")), "steps": 80}],
        optimizer={"lr": 3.0e-3, "warmup_steps": 5},
        monitoring={"every": 1, "tensorboard": True},
        probes={"every": 40, "sets": [{"name": "base", "shards": str(toy.shards("base_probe")), "max_blocks": 16}]},
        snapshot={"every": 10},
    )
    runs = Runs(server, config, tmp_path)
    assert runs.run("through", *engine(stage), world=world) == [0] * world, runs.log("through").read_text()
    log = "revpatch.train.trainer:Trainer._log"
    killed = {"rank": 0, "target": log, "call": 24, "when": "after"}
    assert 0 not in runs.run("moved", *engine(stage), world=world, kill=killed)
    assert runs.run("moved", *engine(other_stage), world=other_world) == [0] * other_world
    expected, found = losses(runs.path("through")), losses(runs.path("moved"))
    assert sorted(found) == sorted(expected) == list(range(1, 81))
    assert [found[step] for step in range(1, 81)] == pytest.approx([expected[step] for step in range(1, 81)], rel=1e-4)
    changed = Ledger(runs.path("moved/ledger"), readonly=True).journal.records()
    assert next(event for event in changed if event["event"] == "resume")["snapshot"] == "step000000000020.safetensors"
