"""Runs that are killed, stopped or started again: real processes, which end as one that ran through does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import BIN, Runs, RunServer, environment, free_port, rank_pid, torchrun
from toy import Toy

from revpatch.ledger.audit import verify
from revpatch.ledger.history import Ledger
from revpatch.training.resume import Standing
from revpatch.training.snapshot import Snapshot

HARM = [[0, 6]]
"""The first phase is rolled back at its step 6."""
CHANGES: dict[str, Any] = {"snapshot": {"every": 5}, "monitoring": {"every": 4}, "probes": {"every": 3}}


@pytest.fixture(scope="module")
def make_runs(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Runs]:
    def make(**changes: Any) -> Runs:
        folder = tmp_path_factory.mktemp("runs")
        return Runs(server, toy.config_file(folder, **{**CHANGES, **changes}), folder, harm=HARM)

    return make


@pytest.fixture(scope="module")
def through(make_runs: Callable[..., Runs]) -> Runs:
    """The runs of one config; that in "through" was never killed."""
    runs = make_runs()
    assert runs.run("through") == [0, 0], runs.log("through").read_text()
    assert len(runs.events("through", "rollback")) == 1
    return runs


MOMENTS: dict[str, dict[str, Any]] = {
    "a rank, in a step": {
        "target": "revpatch.training.engine:AccelerateEngine.train_step",
        "call": 8,
        "when": "before",
    },
    "all ranks, in a step": {
        "target": "revpatch.training.engine:AccelerateEngine.train_step",
        "call": 17,
        "when": "after",
        "rank": "all",
    },
    "before the first snapshot": {"target": "revpatch.training.trainer:Trainer._log", "call": 1, "when": "before"},
    "a snapshot, half": {"target": "revpatch.training.snapshot:write_atomically", "call": 2, "when": "half"},
    "a snapshot, before older ones go": {
        "target": "revpatch.training.snapshot:write_atomically",
        "call": 3,
        "when": "after",
    },
    "a ledger's entry, half": {"target": "revpatch.ledger.entry:write_atomically", "call": 4, "when": "half"},
    "an entry without its line": {"target": "revpatch.ledger.history:write_entry", "call": 4, "when": "after"},
    "a journal's line, half": {"target": "revpatch.ledger.journal:Journal._write", "call": 14, "when": "half"},
    "a probe": {"target": "revpatch.training.watch:Watch.measure", "call": 5, "when": "before"},
    "a rollback, before the state": {"target": "revpatch.training.trainer:restore", "call": 2, "when": "before"},
    "a rollback, before its event": {"target": "revpatch.training.trainer:restore", "call": 2, "when": "after"},
    "a commit, before its entry": {"target": "revpatch.training.trainer:Trainer._commit", "call": 1, "when": "before"},
    "a commit, before the replay": {"target": "revpatch.training.trainer:write_replay", "call": 1, "when": "before"},
    "a commit, before its event": {"target": "revpatch.training.trainer:write_replay", "call": 1, "when": "after"},
    "a commit, before its snapshot": {
        "target": "revpatch.training.trainer:Trainer.take_snapshot",
        "call": 3,
        "when": "before",
    },
    "between phases": {"target": "revpatch.training.trainer:Trainer._begin", "call": 2, "when": "before"},
}
QUICK = ("a rank, in a step", "a snapshot, half", "an entry without its line", "a rollback, before its event")


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
    assert len(through.events(name, "rollback")) == 1
    assert verify(through.path(name)).ok, verify(through.path(name)).problems
    replay = "replay/001_second/manifest.json"
    assert (through.path(name) / replay).read_bytes() == (through.path("through") / replay).read_bytes()


def test_what_is_written_anew_begins_after_the_snapshot_or_at_the_start() -> None:
    folder = Path("run")
    assert Standing(folder).again is None
    assert Standing(folder, begun=True).again == 0, "killed before its first snapshot, it left curves"
    assert Standing(folder, begun=True, snapshot=SimpleNamespace(step=5)).again == 6  # type: ignore[arg-type]


def test_a_third_resume_is_as_good_as_the_first(through: Runs) -> None:
    step = "revpatch.training.engine:AccelerateEngine.train_step"
    for call in (8, 9, 12):
        assert 0 not in through.run("thrice", kill={"rank": 0, "target": step, "call": call, "when": "before"})
    assert through.run("thrice") == [0, 0]
    assert through.commits("thrice") == through.commits("through")
    records = Ledger(through.path("thrice/ledger"), readonly=True).journal.records()
    resumed = [event["snapshot"] for event in records if event["event"] == "resume"]
    assert len(resumed) == 3 and resumed == sorted(resumed) and resumed[0] < resumed[2], "each got further"


def test_the_lower_rate_after_a_rollback_is_gone_on_with(through: Runs) -> None:
    log = {"target": "revpatch.training.trainer:Trainer._log", "call": 6, "when": "before"}
    assert 0 not in through.run("slower", kill={"rank": 0, **log})
    assert through.run("slower") == [0, 0]
    assert through.events("slower", "resume")[0]["snapshot"] == "step000000000010.pt", "after the rollback at step 6"
    assert through.commits("slower") == through.commits("through")


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_in_the_resume_itself(through: Runs, when: str) -> None:
    """Between the journal's line and the renaming, and after both."""
    name = f"resumed_{when}"
    step = {"target": "revpatch.training.engine:AccelerateEngine.train_step", "call": 11, "when": "before"}
    assert 0 not in through.run(name, kill={"rank": 0, **step})
    target = "revpatch.ledger.history:_aside" if when == "before" else "revpatch.training.run_state:go_back"
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
    step = {"rank": 1, "target": "revpatch.training.engine:DeepSpeedEngine.train_step", "call": 9, "when": "after"}
    assert 0 not in through.run(f"killed{stage}", *engine, kill=step)
    assert through.run(f"killed{stage}", *engine) == [0, 0]
    assert through.commits(f"killed{stage}") == through.commits(f"whole{stage}")


def until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("sent", "rank"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
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
    assert snapshots == [f"step{stopped[0]['step']:012d}.pt"]
    assert through.run(name) == [0, 0]
    assert through.commits(name) == through.commits("through")


def test_a_signal_during_a_commit_ends_the_next_phase_before_its_first_step(through: Runs) -> None:
    name, waiting = "in_a_commit", through.folder / "in_a_commit.log.waiting"
    commit = {"target": "revpatch.training.trainer:write_replay", "call": 1}
    pids = through.start(name, "--set", "snapshot.keep=1", wait_at=commit)
    until(waiting.exists)
    os.kill(pids[1], signal.SIGTERM)
    waiting.unlink()
    assert through.server.wait() == [75, 75], through.log(name).read_text()
    assert [event["phase"] for event in through.events(name, "interrupted")] == ["second"]
    step = through.events(name, "interrupted")[0]["step"]
    suffix = "" if step else "_start"
    assert [path.name for path in (through.path(name) / "snapshot").iterdir()] == [f"step{12 + step:012d}{suffix}.pt"]
    assert through.run(name) == [0, 0]
    assert through.commits(name) == through.commits("through")


def test_a_second_sigterm_exits_at_once(through: Runs) -> None:
    probe = "revpatch.training.watch:Watch.measure"
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
    pids = through.start("waiting", wait_at={"target": "revpatch.training.probe:Prober.measure", "call": 2})
    until(lambda: (through.folder / "waiting.log.waiting").exists())
    time.sleep(0.5)
    for _ in range(2):
        os.kill(pids[1], signal.SIGTERM)
        time.sleep(0.5)
    until(lambda: Path(f"/proc/{pids[1]}/stat").read_text().split(") ")[1][0] == "Z", timeout=3)
    os.kill(pids[0], signal.SIGKILL)
    assert through.server.wait(timeout=10) == [-signal.SIGKILL, 128 + signal.SIGTERM]


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
    log = "revpatch.training.trainer:Trainer._log"
    killed = {"rank": 0, "target": log, "call": 24, "when": "after"}
    assert 0 not in runs.run("moved", *engine(stage), world=world, kill=killed)
    assert runs.run("moved", *engine(other_stage), world=other_world) == [0] * other_world
    expected, found = losses(runs.path("through")), losses(runs.path("moved"))
    assert sorted(found) == sorted(expected) == list(range(1, 81))
    assert [found[step] for step in range(1, 81)] == pytest.approx([expected[step] for step in range(1, 81)], rel=1e-4)
    changed = Ledger(runs.path("moved/ledger"), readonly=True).journal.records()
    assert next(event for event in changed if event["event"] == "resume")["snapshot"] == "step000000000020.pt"


def test_a_full_disk_stops_the_run_in_words_and_loses_nothing(through: Runs) -> None:
    """The snapshots are the first files that are too large."""
    largest = max(path.stat().st_size for path in (through.path("through") / "ledger").iterdir())
    assert largest < 70_000 < max(path.stat().st_size for path in (through.path("through") / "snapshot").iterdir())
    assert 0 not in through.run("full", limit=70_000)
    words = through.log("full").read_text()
    assert "could not write" in words and "snapshot/step000000000005.pt" in words
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
    """A signal to the ranks themselves, as Slurm sends it."""
    command = [str(BIN / "deepspeed"), "--num_accelerators=2", f"--master_port={free_port()}", "--module", "revpatch"]
    options = ["train", str(through.config), "--set", f"output_dir={through.path('passed')}"]
    options += ["--set", "phases.0.steps=2000"]
    with through.log("passed").open("w") as log:
        process = subprocess.Popen([*command, *options], env=environment(), stdout=log, stderr=log)
        try:
            until(lambda: "first 4/2000" in through.log("passed").read_text(), timeout=120)
            for rank in (0, 1):
                os.kill(rank_pid(process.pid, rank), signal.SIGUSR1)
            assert process.wait(60) == 75, through.log("passed").read_text()
        finally:
            process.kill()


class TestWhatIsRefusedAndWhatIsNot:
    """One run, ended after its first phase, started again in many ways."""

    @pytest.fixture(scope="class")
    def runs(self, make_runs: Callable[..., Runs]) -> Runs:
        runs = make_runs()
        assert runs.run("run", world=1, kill={"rank": 0, **MOMENTS["between phases"]}) == [-signal.SIGKILL]
        return runs

    @pytest.fixture
    def copy(self, runs: Runs, request: pytest.FixtureRequest) -> str:
        name = f"copy_{request.node.name.replace('[', '_').replace(']', '_')[:60]}"
        shutil.copytree(runs.path("run"), runs.path(name))
        return name

    def refused(self, runs: Runs, name: str, *options: str) -> str:
        before = {path: path.read_bytes() for path in runs.path(name).rglob("*") if path.is_file()}
        assert runs.run(name, *options, world=1) == [2]
        after = {path: path.read_bytes() for path in runs.path(name).rglob("*") if path.is_file()}
        assert {path: data for path, data in after.items() if path.name != "train.log"} == {
            path: data for path, data in before.items() if path.name != "train.log"
        }, "nothing was lost or changed"
        return runs.log(name).read_text()

    def test_another_config(self, runs: Runs, copy: str) -> None:
        words = self.refused(runs, copy, "--set", "optimizer.lr=0.5", "--set", "phases.0.steps=13", "--set", "seed=1")
        for key, then, now in (("optimizer.lr", "0.01", "0.5"), ("phases.0.steps", "12", "13"), ("seed", "0", "1")):
            assert f"{key}: {then} then, {now} now" in words
        assert words.count(" then, ") == 3

    def test_fresh(self, runs: Runs, copy: str) -> None:
        assert "--overwrite" in self.refused(runs, copy, "--fresh")
        assert "needs --fresh" in self.refused(runs, copy, "--overwrite")
        assert runs.run(copy, "--fresh", "--overwrite", world=1) == [0]
        assert "going on with" not in runs.log(copy).read_text()
        assert [event["event"] for event in runs.events(copy, "run")] == ["run"]
        assert not (runs.path(copy) / "snapshot/step000000000005.pt").exists()

    def test_killed_while_it_is_deleted_to_begin_anew(self, runs: Runs, copy: str) -> None:
        config = {"rank": 0, "target": "revpatch.training.resume:write_atomically", "call": 1, "when": "before"}
        assert runs.run(copy, "--fresh", "--overwrite", world=1, kill=config) == [-signal.SIGKILL]
        assert [path.name for path in runs.path(copy).iterdir()] == [".lock"]
        (runs.path(copy) / ".config.yaml.0a1b.tmp").touch()
        assert runs.run(copy, world=1) == [0], "what is left is no one's, and in nobody's way"

    def test_other_shards_under_the_name(self, runs: Runs, copy: str, toy: Toy) -> None:
        place = toy.shards("second_probe")
        words = self.refused(runs, copy, "--set", f"probes.sets.0.shards={place}")
        assert "not the shards that the run has trained with" in words

    def test_a_folder_that_moved(self, runs: Runs, copy: str, toy: Toy, tmp_path: Path) -> None:
        shutil.copytree(toy.shards("base"), tmp_path / "elsewhere")
        options = ["--set", f"replay.base={tmp_path / 'elsewhere'}", "--set", "monitoring.every=2"]
        assert runs.run(copy, *options, world=1) == [0], runs.log(copy).read_text()
        changed = runs.events(copy, "resume")[0]["changed"]
        assert changed.keys() == {"output_dir", "replay.base", "monitoring.every"}
        assert changed["monitoring.every"] == [4, 2]

    def test_the_shards_of_a_committed_phase_may_be_gone_and_no_others(
        self, runs: Runs, copy: str, toy: Toy, tmp_path: Path
    ) -> None:
        gone, there = tmp_path / "gone", tmp_path / "there"
        shutil.copytree(toy.shards("second"), there)
        options = ["--set", f"phases.0.shards={gone}", "--set", f"phases.1.shards={there}"]
        hidden = there.rename(tmp_path / "hidden")
        words = self.refused(runs, copy, *options)
        assert f"phases.1.shards = {there}" in words and "there is no manifest" in words
        hidden.rename(there)
        assert runs.run(copy, *options, world=1) == [0], runs.log(copy).read_text()
        assert len(runs.commits(copy)) == 2

    def test_another_base(self, runs: Runs, copy: str, toy: Toy, tmp_path: Path) -> None:
        from toy import save_base

        other = save_base(tmp_path / "other", toy.tokenizer, seed=5)
        assert "begun with" in self.refused(runs, copy, "--set", f"base.model={other}")

    def test_a_journal_of_another_history(self, runs: Runs, copy: str) -> None:
        journal = runs.path(copy) / "ledger/journal.jsonl"
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:5]))
        words = self.refused(runs, copy)
        assert "put back the journal" in words and "remove snapshot/" not in words, "no older one is of it either"
        assert "--fresh --overwrite" in words

    def test_a_journal_that_an_older_snapshot_belongs_to(self, runs: Runs, copy: str) -> None:
        older, newest = (Snapshot.read(path) for path in sorted((runs.path(copy) / "snapshot").iterdir()))
        journal = runs.path(copy) / "ledger/journal.jsonl"
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[: older.events]))
        told = re.search(r"remove (snapshot/\S+) to go on from (\S+),", " ".join(self.refused(runs, copy).split()))
        assert told is not None and told.groups() == (f"snapshot/{newest.name}", older.name)
        (runs.path(copy) / told[1]).unlink()
        assert runs.run(copy, world=1) == [0], runs.log(copy).read_text()
        assert runs.events(copy, "resume")[0]["snapshot"] == older.name
        assert verify(runs.path(copy)).ok

    def test_a_damaged_snapshot_gives_way_to_the_one_before(self, runs: Runs, copy: str) -> None:
        newest = max((runs.path(copy) / "snapshot").iterdir())
        data = bytearray(newest.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 500] = bytes(byte ^ 1 for byte in data[middle : middle + 500])
        newest.write_bytes(data)
        assert runs.run(copy, world=1) == [0], runs.log(copy).read_text()
        words = runs.log(copy).read_text()
        assert f"snapshot {newest.name} can't be used" in words and "going on" in words
        assert (newest.with_name(f"{newest.name}.damaged")).exists()

    def test_damaged_snapshots_alone(self, runs: Runs, copy: str) -> None:
        for path in (runs.path(copy) / "snapshot").iterdir():
            path.write_bytes(path.read_bytes()[:-100])
        before = (runs.path(copy) / "ledger/journal.jsonl").read_bytes()
        assert runs.run(copy, world=1) == [2]
        assert "found damaged ones alone" in runs.log(copy).read_text()
        assert (runs.path(copy) / "ledger/journal.jsonl").read_bytes() == before
        assert (runs.path(copy) / "replay/000_first").is_dir()

    def test_a_run_that_is_over_and_then_gets_another_phase(self, runs: Runs, copy: str, toy: Toy) -> None:
        assert runs.run(copy, world=1) == [0]
        commits = runs.commits(copy)
        journal = (runs.path(copy) / "ledger/journal.jsonl").read_bytes()
        assert runs.run(copy, world=1) == [0]
        assert "is over" in runs.log(copy).read_text()
        assert (runs.path(copy) / "ledger/journal.jsonl").read_bytes() == journal
        (runs.path(copy) / "snapshot").rename(runs.folder / "away")
        words = self.refused(runs, copy)
        assert "expected a snapshot in snapshot/" in words and "--fresh --overwrite" in words
        (runs.folder / "away").rename(runs.path(copy) / "snapshot")
        phases = [{"name": n, "shards": str(toy.shards(n)), "steps": 12} for n in ("first", "second")]
        third = {"name": "third", "shards": str(toy.shards("first")), "steps": 6}
        option = f"phases={json.dumps([*phases, third])}"
        assert runs.run(copy, "--set", option, world=1) == [0], runs.log(copy).read_text()
        assert runs.commits(copy)[:2] == commits and len(runs.commits(copy)) == 3
        assert verify(runs.path(copy)).ok

    def test_two_at_once(self, runs: Runs, copy: str) -> None:
        import fcntl

        with (runs.path(copy) / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert "another process is writing to this folder" in self.refused(runs, copy)


def test_steps_may_change_while_the_phase_is_under_way(make_runs: Callable[..., Runs]) -> None:
    runs = make_runs()
    kill = {"rank": 0, "target": "revpatch.training.trainer:Trainer._log", "call": 3, "when": "before"}
    assert runs.run("run", world=1, kill=kill) == [-signal.SIGKILL]
    assert runs.run("run", "--set", "phases.0.steps=4", world=1) == [2], "fewer than were made"
    assert runs.run("run", "--set", "phases.0.steps=15", world=1) == [0], runs.log("run").read_text()
    assert [event["step"] for event in runs.events("run", "probe") if event["phase"] == "first"][-1] == 15
