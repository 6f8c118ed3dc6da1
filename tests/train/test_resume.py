"""Runs that are killed or stopped: real processes, which end as one that ran through does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from kill_moments import MOMENTS, QUICK
from ranks import BIN, Runs, descendants, environment, free_port, rank_pid, torchrun
from toy import Toy
from waiting import until

from revpatch.ledger.ledger import Ledger
from revpatch.ledger.maintenance import verify
from revpatch.train.resume import RunStatus


@pytest.fixture(scope="module")
def through(make_runs: Callable[..., Runs]) -> Runs:
    """The runs of one config; that in "through" was never killed."""
    runs = make_runs()
    assert runs.run("through") == [0, 0], runs.log("through").read_text()
    assert len(runs.events("through", "rollback")) == 1
    return runs


@pytest.mark.parametrize(
    "moment", [pytest.param(key, marks=[] if key in QUICK else [pytest.mark.slow]) for key in MOMENTS]
)
def test_a_run_that_was_killed_ends_with_the_same_commits(through: Runs, moment: str) -> None:
    name = moment.replace(" ", "_").replace(",", "")
    kill = {"rank": 1 if moment == "a rank, in a step" else 0, **MOMENTS[moment]}
    codes = through.run(name, kill=kill)
    assert -signal.SIGKILL in codes and 0 not in codes, (codes, through.log(name).read_text())
    assert through.run(name) == [0, 0], through.log(name).read_text()
    assert "going on with the run in" in through.log(name).read_text()
    assert through.commits(name) == through.commits("through")
    assert len(through.events(name, "rollback")) == len(through.events(name, "run_end")) == 1
    assert verify(through.path(name)).ok, verify(through.path(name)).problems
    replay = "replay/001_second/manifest.json"
    assert (through.path(name) / replay).read_bytes() == (through.path("through") / replay).read_bytes()


def test_what_is_written_anew_begins_after_the_snapshot_or_at_the_start(toy: Toy, tmp_path: Path) -> None:
    new = RunStatus(tmp_path, toy.config(tmp_path))
    assert new.again is None
    assert replace(new, begun=True).again == 0, "killed before its first snapshot, it left curves"
    assert replace(new, begun=True, snapshot=SimpleNamespace(step=5)).again == 6  # type: ignore[arg-type]


def test_a_third_resume_is_as_good_as_the_first(through: Runs) -> None:
    step = "revpatch.step.engine:AccelerateEngine.train_step"
    for call in (8, 9, 12):
        assert 0 not in through.run("thrice", kill={"rank": 0, "target": step, "call": call, "when": "before"})
    assert through.run("thrice") == [0, 0]
    assert through.commits("thrice") == through.commits("through")
    records = Ledger(through.path("thrice/ledger"), readonly=True).journal.records()
    resumed = [event["snapshot"] for event in records if event["event"] == "resume"]
    assert len(resumed) == 3 and resumed == sorted(resumed) and resumed[0] < resumed[2], "each got further"


def test_the_lower_rate_after_a_rollback_is_gone_on_with(through: Runs) -> None:
    log = {"target": "revpatch.train.trainer:Trainer._log", "call": 6, "when": "before"}
    assert 0 not in through.run("slower", kill={"rank": 0, **log})
    assert through.run("slower") == [0, 0]
    assert through.events("slower", "resume")[0]["snapshot"] == "step000000000010.safetensors", (
        "after the rollback at step 6"
    )
    assert through.commits("slower") == through.commits("through")


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_in_the_resume_itself(through: Runs, when: str) -> None:
    """Between the journal's line and the renaming, and after both."""
    name = f"resumed_{when}"
    step = {"target": "revpatch.step.engine:AccelerateEngine.train_step", "call": 11, "when": "before"}
    assert 0 not in through.run(name, kill={"rank": 0, **step})
    target = "revpatch.ledger.ledger:_aside" if when == "before" else "revpatch.train.state:go_back"
    assert 0 not in through.run(name, kill={"rank": 0, "target": target, "call": 1, "when": when})
    assert through.run(name) == [0, 0], through.log(name).read_text()
    assert through.commits(name) == through.commits("through")
    assert verify(through.path(name)).ok


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_under_deepspeed_too(through: Runs, stage: int) -> None:
    zero = through.folder / f"zero{stage}.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    engine = ["--set", "engine.kind=deepspeed", "--set", f"engine.deepspeed={zero}"]
    assert through.run(f"whole{stage}", *engine) == [0, 0]
    step = {"rank": 1, "target": "revpatch.step.engine:DeepSpeedEngine.train_step", "call": 9, "when": "after"}
    assert 0 not in through.run(f"killed{stage}", *engine, kill=step)
    assert through.run(f"killed{stage}", *engine) == [0, 0]
    assert through.commits(f"killed{stage}") == through.commits(f"whole{stage}")


@pytest.mark.parametrize(
    ("sent", "rank"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1), (signal.SIGINT, 1), (signal.SIGHUP, 0)]
)
def test_a_signal_to_any_rank_ends_the_step_and_writes_a_snapshot(
    through: Runs, sent: signal.Signals, rank: int
) -> None:
    name = f"stopped_by_{sent.name}"
    pids = through.start(name, "--set", "snapshot.every=1000")
    until(lambda: "first 4/12" in through.log(name).read_text())
    os.kill(pids[rank], sent)
    assert through.server.wait() == [75, 75], through.log(name).read_text()
    stopped = through.events(name, "interrupted")
    assert len(stopped) == 1 and 4 <= stopped[0]["step"] < 12
    snapshots = [path.name for path in (through.path(name) / "snapshot").iterdir()]
    assert snapshots == [f"step{stopped[0]['step']:012d}.safetensors"]
    assert through.run(name) == [0, 0]
    assert through.commits(name) == through.commits("through")


def test_a_signal_during_a_commit_ends_the_next_phase_before_its_first_step(through: Runs) -> None:
    name, waiting = "in_a_commit", through.folder / "in_a_commit.log.waiting"
    commit = {"target": "revpatch.train.trainer:write_replay", "call": 1}
    pids = through.start(name, wait_at=commit)
    until(waiting.exists)
    os.kill(pids[1], signal.SIGTERM)
    waiting.unlink()
    assert through.server.wait() == [75, 75], through.log(name).read_text()
    assert [event["phase"] for event in through.events(name, "interrupted")] == ["second"]
    step = through.events(name, "interrupted")[0]["step"]
    suffix = "" if step else "_start"
    newest = max(path.name for path in (through.path(name) / "snapshot").iterdir())
    assert newest == f"step{12 + step:012d}{suffix}.safetensors"
    assert through.run(name) == [0, 0]
    assert through.commits(name) == through.commits("through")


def test_a_second_sigterm_exits_at_once(through: Runs) -> None:
    probe = "revpatch.train.state:Watch.measure"
    pids = through.start("twice", world=1, wait_at={"target": probe, "call": 2})
    until(lambda: (through.folder / "twice.log.waiting").exists())
    os.kill(pids[0], signal.SIGTERM)
    time.sleep(0.05)
    os.kill(pids[0], signal.SIGTERM)  # a launcher passing on what its ranks got as well
    time.sleep(0.5)
    os.kill(pids[0], signal.SIGTERM)
    assert through.server.wait(timeout=5) == [128 + signal.SIGTERM]
    assert through.run("twice", world=1) == [0]


def test_a_second_sigterm_ends_a_rank_that_waits_for_another(through: Runs) -> None:
    """Python's own handlers would not run there."""
    pids = through.start("waiting", wait_at={"target": "revpatch.evaluation.probe:Prober.measure", "call": 2})
    until(lambda: (through.folder / "waiting.log.waiting").exists())
    time.sleep(0.5)
    for _ in range(2):
        os.kill(pids[1], signal.SIGTERM)
        time.sleep(0.5)
    until(lambda: Path(f"/proc/{pids[1]}/stat").read_text().split(") ")[1][0] == "Z", timeout=3)
    os.kill(pids[0], signal.SIGKILL)
    assert through.server.wait(timeout=10) == [-signal.SIGKILL, 128 + signal.SIGTERM]


def test_a_full_disk_stops_the_run_in_words_and_loses_nothing(through: Runs) -> None:
    """The snapshots are the first files that are too large."""
    largest = max(path.stat().st_size for path in (through.path("through") / "ledger").iterdir())
    snapshot = max(path.stat().st_size for path in (through.path("through") / "snapshot").iterdir())
    assert largest < snapshot
    assert 0 not in through.run("full", limit=(largest + snapshot) // 2)
    words = through.log("full").read_text()
    assert "could not write" in words and "snapshot/step000000000005.safetensors" in words
    assert "another rank has ended" in words
    assert through.run("full") == [0, 0], through.log("full").read_text()
    assert through.commits("full") == through.commits("through")


@pytest.mark.slow
def test_torchrun_that_is_told_to_stop_leaves_a_snapshot(through: Runs) -> None:
    options = ["train", str(through.config), "--set", f"output_dir={through.path('told')}"]
    options += ["--set", "snapshot.every=1000", "--set", "phases.0.steps=2000"]
    with through.log("told").open("w") as log:
        process = subprocess.Popen(
            [*torchrun(2), "-m", "revpatch", *options], env=environment(), stdout=log, stderr=log
        )
        try:
            until(lambda: "first 4/2000" in through.log("told").read_text(), timeout=120)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) != 0
        finally:
            process.kill()
    assert through.events("told", "interrupted"), through.log("told").read_text()
    assert len(list((through.path("told") / "snapshot").iterdir())) == 1


@pytest.mark.slow
def test_deepspeed_passes_the_exit_code_on(through: Runs) -> None:
    """A signal to the ranks themselves, found as the docs say: not to the launchers, which would end them."""
    root = Path(__file__).parents[2]
    docs = [" ".join((root / name).read_text("utf-8").split()) for name in ("docs/OPERATIONS.md",)]
    (pattern,) = {found for doc in docs for found in re.findall(r"pkill -TERM -f '([^']+)'", doc)}
    assert all(pattern in doc for doc in docs)
    command = [str(BIN / "deepspeed"), "--num_accelerators=2", f"--master_port={free_port()}", "--module", "revpatch"]
    options = ["train", str(through.config), "--set", f"output_dir={through.path('passed')}"]
    options += ["--set", "phases.0.steps=2000"]
    with through.log("passed").open("w") as log:
        process = subprocess.Popen([*command, *options], env=environment(), stdout=log, stderr=log)
        try:
            until(lambda: "first 4/2000" in through.log("passed").read_text(), timeout=120)
            matched = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()
            ranks = {int(pid) for pid in matched} & set(descendants(process.pid))
            assert ranks == {rank_pid(process.pid, rank) for rank in (0, 1)}
            for pid in ranks:
                os.kill(pid, signal.SIGTERM)
            assert process.wait(60) == 75, through.log("passed").read_text()
        finally:
            process.kill()
