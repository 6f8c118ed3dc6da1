"""Runs that are killed or stopped: they end as one that ran through does, on as many ranks or others."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import Runs, RunServer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import Toy
from waiting import until

from revpatch.ledger.maintenance import verify

STEP = "revpatch.step.engine:AccelerateEngine.train_step"
RESTORE, REPLAY = "revpatch.train.trainer:restore_state", "revpatch.train.trainer:write_replay"
ENTRY, SNAPSHOT = "revpatch.ledger.patch_file:write_atomically", "revpatch.train.snapshot:write_atomically"
MOMENTS: dict[str, tuple[str, int, str]] = {
    "a rank, in a step": (STEP, 8, "before"),
    "a snapshot, half": (SNAPSHOT, 2, "half"),
    "an entry without its line": ("revpatch.ledger.ledger:write_entry", 4, "after"),
    "a rollback, before its event": (RESTORE, 2, "after"),
    "all ranks, in a step": (STEP, 11, "after"),
    "before the first snapshot": ("revpatch.train.trainer:Trainer._log", 1, "before"),
    "a ledger's entry, half": (ENTRY, 4, "half"),
    "a journal's line, half": ("revpatch.ledger.journal:Journal._write", 14, "half"),
    "a probe": ("revpatch.train.state:Watch.measure", 5, "before"),
    "a commit, before its entry": ("revpatch.train.trainer:Trainer._commit", 1, "before"),
    "a commit, before its event": (REPLAY, 1, "after"),
    "a commit, before its snapshot": ("revpatch.train.trainer:Trainer.take_snapshot", 3, "before"),
    "between phases": ("revpatch.train.trainer:Trainer._begin", 2, "before"),
    "before its end is recorded": ("revpatch.monitoring.record:Record.end", 1, "before"),
}
"""The call at which a rank is killed: the target, its n-th call, and when of it."""


def kill_at(moment: str) -> dict[str, Any]:
    rank = {"a rank, in a step": 1, "all ranks, in a step": "all"}.get(moment, 0)
    return {"rank": rank, **dict(zip(("target", "call", "when"), MOMENTS[moment], strict=True))}


@pytest.fixture(scope="module")
def through(make_runs: Callable[..., Runs]) -> Runs:
    """The runs of one config; that in "through" was never killed."""
    runs = make_runs()
    assert runs.run("through") == [0, 0], runs.log("through").read_text()
    assert len(runs.events("through", "rollback")) == 1
    return runs


@pytest.mark.parametrize(
    "moment", [pytest.param(key, marks=[] if n < 4 else [pytest.mark.slow]) for n, key in enumerate(MOMENTS)]
)
def test_a_run_that_was_killed_ends_with_the_same_commits(through: Runs, moment: str) -> None:
    name = moment.replace(" ", "_").replace(",", "")
    codes = through.run(name, kill=kill_at(moment))
    assert -signal.SIGKILL in codes and 0 not in codes, (codes, through.log(name).read_text())
    assert through.run(name) == [0, 0], through.log(name).read_text()
    assert "resuming the run in" in through.log(name).read_text()
    assert through.commits(name) == through.commits("through")
    assert len(through.events(name, "rollback")) == len(through.events(name, "run_end")) == 1
    assert verify(through.path(name)).ok, verify(through.path(name)).problems
    replay = "replay/001_second/manifest.json"
    assert (through.path(name) / replay).read_bytes() == (through.path("through") / replay).read_bytes()


def test_killed_in_the_resume_itself_again_and_again(through: Runs) -> None:
    """Between the journal's line and the renaming, and after both."""
    for target, call, when in (
        (STEP, 5, "before"),  # an entry of step 4 is newer than the snapshot
        ("revpatch.ledger.ledger:_aside", 1, "before"),
        ("revpatch.train.state:go_back", 1, "after"),
        ("revpatch.train.trainer:Trainer._commit", 1, "before"),
    ):
        kill = {"rank": 0, "target": target, "call": call, "when": when}
        assert -signal.SIGKILL in through.run("again", kill=kill), through.log("again").read_text()
    assert through.run("again") == [0, 0], through.log("again").read_text()
    assert through.commits("again") == through.commits("through")
    assert verify(through.path("again")).ok
    resumed = [event["snapshot"] for event in through.events("again", "resume")]
    assert resumed == sorted(resumed) and resumed[0] < resumed[-1], "it got further"


@pytest.mark.slow
def test_under_deepspeed_too(through: Runs) -> None:
    zero = through.folder / "zero2.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    engine = ["--set", "engine.kind=deepspeed", "--set", f"engine.deepspeed={zero}"]
    assert through.run("whole", *engine) == [0, 0]
    step = {"rank": 1, "target": "revpatch.step.engine:DeepSpeedEngine.train_step", "call": 8, "when": "after"}
    assert 0 not in through.run("killed", *engine, kill=step)
    assert through.run("killed", *engine) == [0, 0]
    assert through.commits("killed") == through.commits("whole")


@pytest.mark.parametrize(
    ("sent", "rank", "where", "phase"),
    [
        (signal.SIGTERM, 0, "revpatch.evaluation.probe:Prober.measure", "first"),
        (signal.SIGUSR1, 1, "revpatch.evaluation.probe:Prober.measure", "first"),
        (signal.SIGTERM, 1, REPLAY, "second"),  # in a commit: before the next phase's first step
    ],
)
def test_a_signal_to_any_rank_ends_the_step_and_writes_a_snapshot(
    through: Runs, sent: signal.Signals, rank: int, where: str, phase: str
) -> None:
    name = f"{sent.name}_{phase}"
    waiting = through.folder / f"{name}.log.waiting"
    call = 2 if phase == "first" else 1
    pids = through.start(name, "--set", "snapshot.every=1000", wait_at={"target": where, "call": call})
    until(waiting.exists)
    os.kill(pids[rank], sent)
    waiting.unlink()
    assert through.server.wait() == [75, 75], through.log(name).read_text()
    (stopped,) = through.events(name, "interrupted")
    assert stopped["phase"] == phase and stopped["step"] < 8
    newest = max(path.name for path in (through.path(name) / "snapshot").iterdir())
    step = stopped["step"] + (8 if phase == "second" else 0)
    assert newest == f"step{step:012d}{'' if stopped['step'] else '_start'}.safetensors"
    assert through.run(name) == [0, 0]
    assert through.commits(name) == through.commits("through")


def test_a_second_sigterm_ends_a_rank_that_waits_for_another(through: Runs) -> None:
    """Python's own handlers would not run there. Signals within half a second are one."""
    pids = through.start("waiting", wait_at={"target": "revpatch.evaluation.probe:Prober.measure", "call": 2})
    until(lambda: (through.folder / "waiting.log.waiting").exists())
    for _ in range(3):
        os.kill(pids[1], signal.SIGTERM)
        time.sleep(0.6)
    until(lambda: Path(f"/proc/{pids[1]}/stat").read_text().split(") ")[1][0] == "Z")
    os.kill(pids[0], signal.SIGKILL)
    assert through.server.wait() == [-signal.SIGKILL, 128 + signal.SIGTERM]


def test_a_full_disk_stops_the_run_in_words_and_loses_nothing(through: Runs) -> None:
    """The snapshots are the first files that are too large."""
    largest = max(path.stat().st_size for path in (through.path("through") / "ledger").iterdir())
    snapshot = max(path.stat().st_size for path in (through.path("through") / "snapshot").iterdir())
    assert largest < snapshot
    assert 0 not in through.run("full", limit=(largest + snapshot) // 2)
    words = through.log("full").read_text()
    assert "could not write" in words and "snapshot/step000000000003.safetensors" in words
    assert "another rank has ended" in words
    assert through.run("full") == [0, 0], through.log("full").read_text()
    assert through.commits("full") == through.commits("through")


def losses(run: Path) -> dict[int, float]:
    """loss by step of the run, from TensorBoard's files, as they count after a purge."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {scalar.step: scalar.value for scalar in events.Scalars("loss/loss")}


@pytest.fixture(scope="module")
def plain(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """ "through" is a run of 16 steps on two ranks."""
    folder = tmp_path_factory.mktemp("elsewhere")
    config = toy.config_file(
        folder,
        phases=[{"name": "first", "shards": str(toy.shards("first")), "steps": 16}],
        optimizer={"lr": 3.0e-3},
        monitoring={"every": 1, "tensorboard": True},
        probes={"every": 16, "sets": []},
        snapshot={"every": 2},
    )
    runs = Runs(server, config, folder)
    assert runs.run("through") == [0, 0], runs.log("through").read_text()
    return runs


@pytest.mark.parametrize(
    "legs",
    [
        [(1, None), (4, None), (2, None)],
        pytest.param([(2, 2), (4, 1), (1, 0), (2, None)], marks=pytest.mark.slow),
    ],
    ids=["ranks", "ranks, engines and ZeRO stages"],
)
def test_a_resume_on_other_ranks_or_engines_has_the_same_losses(
    plain: Runs, legs: list[tuple[int, int | None]]
) -> None:
    """Each leg is killed after its fourth step, but the last."""
    name = f"moved{len(legs)}"
    for number, (world, stage) in enumerate(legs):
        options = ["--set", "engine.kind=accelerate", "--set", "engine.deepspeed=null"]
        if stage is not None:
            zero = plain.folder / f"zero{stage}.json"
            zero.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
            options = ["--set", "engine.kind=deepspeed", "--set", f"engine.deepspeed={zero}"]
        last = number == len(legs) - 1
        log = {"rank": 0, "target": "revpatch.train.trainer:Trainer._log", "call": 4, "when": "after"}
        codes = plain.run(name, *options, world=world, **({} if last else {"kill": log}))
        assert codes == [0] * world if last else 0 not in codes, plain.log(name).read_text()
    resumed = [event["snapshot"] for event in plain.events(name, "resume")]
    assert len(set(resumed)) == len(legs) - 1, "each leg made steps of its own"
    expected, found = losses(plain.path("through")), losses(plain.path(name))
    assert sorted(found) == sorted(expected) == list(range(1, 17))
    assert [found[step] for step in range(1, 17)] == pytest.approx([expected[step] for step in range(1, 17)], rel=1e-4)
