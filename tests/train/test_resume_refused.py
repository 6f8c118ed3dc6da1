"""What a run that is started again refuses, and what it does not: another config, other shards, damage."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from kill_moments import MOMENTS
from ranks import Runs
from toy import Toy

from revpatch.ledger.maintenance import verify
from revpatch.train.snapshot import Snapshot


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
        assert "resuming" not in runs.log(copy).read_text()
        assert [event["event"] for event in runs.events(copy, "run")] == ["run"]
        assert not (runs.path(copy) / "snapshot/step000000000005.safetensors").exists()

    def test_killed_while_it_is_deleted_to_begin_anew(self, runs: Runs, copy: str) -> None:
        config = {"rank": 0, "target": "revpatch.train.resume:write_atomically", "call": 1, "when": "before"}
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
        told = re.search(r"remove (snapshot/\S+) to resume from (\S+),", " ".join(self.refused(runs, copy).split()))
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
        assert f"snapshot {newest.name} can't be used" in words and "resuming" in words
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
    kill = {"rank": 0, "target": "revpatch.train.trainer:Trainer._log", "call": 3, "when": "before"}
    assert runs.run("run", world=1, kill=kill) == [-signal.SIGKILL]
    assert runs.run("run", "--set", "phases.0.steps=4", world=1) == [2], "fewer than were made"
    shutil.copytree(runs.path("run"), runs.path("same"))
    assert runs.run("run", "--set", "phases.0.steps=15", world=1) == [0], runs.log("run").read_text()
    assert [event["step"] for event in runs.events("run", "probe") if event["phase"] == "first"][-1] == 15
    made = Snapshot.read(max((runs.path("same") / "snapshot").iterdir())).step
    assert made % 3, "not a step at which a probe is due"
    assert runs.run("same", "--set", f"phases.0.steps={made}", world=1) == [0], runs.log("same").read_text()
    commit = runs.events("same", "commit")[0]
    assert commit["step"] == made and not commit["rollbacks"], "what was trained is probed and kept"


@pytest.mark.parametrize(
    ("launch", "options"),
    [
        ({"TORCHELASTIC_RUN_ID": "revpatch"}, ["--fresh", "--overwrite"]),
        ({"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_PROCID": 0, "SLURM_NTASKS": 1}, ["--fresh"]),
    ],
)
def test_what_its_launcher_starts_again_is_not_begun_anew(
    make_runs: Callable[..., Runs], launch: dict[str, object], options: list[str]
) -> None:
    """A launcher forwards the options of its first start."""
    runs = make_runs()
    kill = {"rank": 0, **MOMENTS["between phases"]}
    assert runs.run("run", *options, world=1, environ=launch, kill=kill) == [-signal.SIGKILL]
    if "--overwrite" not in options:
        assert runs.run("run", *options, world=1, environ={**launch, "SLURM_JOB_ID": 8}) == [2], "another launch"
        assert "--fresh would begin another" in runs.log("run").read_text()
    assert runs.run("run", *options, world=1, environ=launch) == [0], runs.log("run").read_text()
    assert "it is resumed" in (runs.path("run") / "train.log").read_text()
    assert len(runs.events("run", "resume")) == 1, "its history is resumed"
