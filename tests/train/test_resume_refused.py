"""What a run that is started again refuses, and what not: another config, other shards, damage, made patches."""

from __future__ import annotations

import fcntl
import json
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Runs
from toy import Toy, save_base

from revpatch.ledger.ledger import Ledger, read_patch
from revpatch.ledger.maintenance import verify
from revpatch.train import resume
from revpatch.train.resume import ConfigError, run_status
from revpatch.train.snapshot import Snapshot

BETWEEN_PHASES = {"rank": 0, "target": "revpatch.train.trainer:Trainer._begin", "call": 2, "when": "before"}


@pytest.fixture(scope="module")
def runs(make_runs: Callable[..., Runs]) -> Runs:
    """ "run" was ended after its first phase."""
    runs = make_runs()
    assert runs.run("run", world=1, kill=BETWEEN_PHASES) == [-signal.SIGKILL]
    return runs


@pytest.fixture
def copy(runs: Runs, request: pytest.FixtureRequest) -> str:
    name = "".join(letter if letter.isalnum() else "_" for letter in request.node.name)[:80]
    shutil.copytree(runs.path("run"), runs.path(name))
    return name


def contents(run: Path) -> dict[Path, bytes]:
    files = (path for path in run.rglob("*") if path.is_file() and path.name != "train.log")
    return {path: path.read_bytes() for path in files}


def refused(runs: Runs, name: str, *options: str) -> str:
    before = contents(runs.path(name))
    assert runs.run(name, *options, world=1) == [2], runs.log(name).read_text()
    assert contents(runs.path(name)) == before, "nothing was lost or changed"
    return " ".join(runs.log(name).read_text().split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["optimizer.lr=0.5", "phases.0.steps=13", "seed=1"],
            ["optimizer.lr: 0.01 then, 0.5 now", "phases.0.steps: 8 then, 13 now", "seed: 0 then, 1 now"],
        ),
        (["--fresh"], ["--overwrite"]),
        (["--overwrite"], ["needs --fresh"]),
        (["probes.sets.0.shards={second_probe}"], ["not the shards that the run has trained with"]),
        (["phases.1.shards={folder}/gone"], ["phases.1.shards = ", "there is no manifest"]),
        (["base.model={folder}/other_base"], ["begun with"]),
    ],
    ids=lambda value: value[0],
)
def test_a_changed_config_is_refused(runs: Runs, toy: Toy, options: list[str], words: list[str]) -> None:
    if "other_base" in options[0] and not (runs.folder / "other_base").exists():
        save_base(runs.folder / "other_base", toy.tokenizer, seed=5)
    places = {"second_probe": toy.shards("second_probe"), "folder": runs.folder}
    given = [x for each in options for x in ([each] if each[0] == "-" else ["--set", each.format(**places)])]
    said = refused(runs, "run", *given)
    assert not [word for word in words if word not in said], said
    assert said.count(" then, ") == (3 if len(options) == 3 else 0)


def test_a_damaged_run_is_refused_and_told_what_to_put_back(runs: Runs, copy: str) -> None:
    run, log = runs.path(copy), runs.log(copy)
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is writing to this folder" in refused(runs, copy)
    journal = (run / "ledger/journal.jsonl").read_text()
    (run / "ledger/journal.jsonl").write_text("".join(journal.splitlines(keepends=True)[:5]))
    words = refused(runs, copy)
    assert "put back the journal" in words and "remove snapshot/" not in words, "no older one is of it either"
    assert "--fresh --overwrite" in words
    (run / "ledger/journal.jsonl").write_text(journal)
    for path in (run / "snapshot").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    assert runs.run(copy, world=1) == [2]
    assert "found damaged ones alone" in log.read_text()
    assert (run / "ledger/journal.jsonl").read_text() == journal and (run / "replay/000_first").is_dir()


def test_killed_while_it_is_deleted_to_begin_anew(runs: Runs, copy: str) -> None:
    config = {"rank": 0, "target": "revpatch.train.resume:write_atomically", "call": 1, "when": "before"}
    assert runs.run(copy, "--fresh", "--overwrite", world=1, kill=config) == [-signal.SIGKILL]
    assert [path.name for path in runs.path(copy).iterdir()] == [".lock"]
    (runs.path(copy) / ".config.yaml.0a1b.tmp").touch()
    assert runs.run(copy, world=1) == [0], "what is left is no one's, and in nobody's way"
    assert "resuming" not in runs.log(copy).read_text()
    assert [event["event"] for event in runs.events(copy, "run")] == ["run"]


def test_what_may_change_and_what_is_over_and_then_gets_another_phase(runs: Runs, copy: str, toy: Toy) -> None:
    """A folder that moved, the shards of a committed phase that are gone, a knob of monitoring, a third phase."""
    moved = shutil.copytree(toy.shards("base"), runs.folder / "moved")
    changes = {"replay.base": moved, "phases.0.shards": runs.folder / "gone", "monitoring.every": 1}
    options = [x for key, value in changes.items() for x in ("--set", f"{key}={value}")]
    assert runs.run(copy, *options, world=1) == [0], runs.log(copy).read_text()
    changed = runs.events(copy, "resume")[0]["changed"]
    assert changed.keys() == {"output_dir", *changes} and changed["monitoring.every"] == [2, 1]
    commits, journal = runs.commits(copy), (runs.path(copy) / "ledger/journal.jsonl").read_bytes()
    assert len(commits) == 2
    assert runs.run(copy, *options, world=1) == [0]
    assert "is over" in runs.log(copy).read_text()
    assert (runs.path(copy) / "ledger/journal.jsonl").read_bytes() == journal
    (runs.path(copy) / "snapshot").rename(runs.folder / "away")
    words = refused(runs, copy, *options)
    assert "expected a snapshot in snapshot/" in words and "--fresh --overwrite" in words
    (runs.folder / "away").rename(runs.path(copy) / "snapshot")
    phases = [{"name": n, "shards": str(toy.shards(n)), "steps": steps} for n, steps in (("first", 8), ("second", 4))]
    third = {"name": "third", "shards": str(toy.shards("first")), "steps": 3}
    option = f"phases={json.dumps([*phases, third])}"
    assert runs.run(copy, "--set", option, world=1) == [0], runs.log(copy).read_text()
    assert runs.commits(copy)[:2] == commits and len(runs.commits(copy)) == 3
    assert verify(runs.path(copy)).ok


def test_an_older_snapshot_is_resumed_from_where_the_newest_does_not_fit_or_is_damaged(runs: Runs, copy: str) -> None:
    run = runs.path(copy)
    older, newest = (Snapshot.read(path) for path in sorted((run / "snapshot").iterdir()))
    shutil.copytree(run, runs.path("damaged"))
    journal = run / "ledger/journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[: older.events]))
    advice = re.search(r"remove (snapshot/\S+) to resume from (\S+),", refused(runs, copy))
    assert advice is not None and advice.groups() == (f"snapshot/{newest.name}", older.name)
    (run / advice[1]).unlink()
    damaged = runs.path("damaged") / "snapshot" / newest.name
    data = bytearray(damaged.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 500] = bytes(byte ^ 1 for byte in data[middle : middle + 500])
    damaged.write_bytes(data)
    for name in (copy, "damaged"):
        assert runs.run(name, world=1) == [0], runs.log(name).read_text()
        assert runs.events(name, "resume")[0]["snapshot"] == older.name
        assert verify(runs.path(name)).ok
    assert f"snapshot {newest.name} can't be used" in runs.log("damaged").read_text()
    assert damaged.with_name(f"{newest.name}.damaged").exists()
    assert runs.commits("damaged") == runs.commits(copy)


def test_steps_may_change_while_the_phase_is_under_way(make_runs: Callable[..., Runs]) -> None:
    runs = make_runs()
    kill = {"rank": 0, "target": "revpatch.train.trainer:Trainer._commit", "call": 1, "when": "before"}
    assert runs.run("run", world=1, kill=kill) == [-signal.SIGKILL]
    assert "phases.0.steps: 8 then, 3 now" in refused(runs, "run", "--set", "phases.0.steps=3")
    made = Snapshot.read(max((runs.path("run") / "snapshot").iterdir())).step
    for name, steps in (("more", 9), ("same", made)):
        shutil.copytree(runs.path("run"), runs.path(name))
        assert runs.run(name, "--set", f"phases.0.steps={steps}", world=1) == [0], runs.log(name).read_text()
        commit = runs.events(name, "commit")[0]
        assert commit["step"] == steps and commit["rollbacks"] == 1, "what was trained is probed and kept"


def test_what_its_launcher_starts_again_is_not_begun_anew(make_runs: Callable[..., Runs]) -> None:
    """A launcher forwards the options of its first start."""
    runs = make_runs()
    launch = {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_PROCID": 0, "SLURM_NTASKS": 1}
    assert runs.run("run", "--fresh", world=1, environ=launch, kill=BETWEEN_PHASES) == [-signal.SIGKILL]
    assert runs.run("run", "--fresh", world=1, environ={**launch, "SLURM_JOB_ID": 8}) == [2], "another launch"
    assert "--fresh would begin another" in runs.log("run").read_text()
    assert runs.run("run", "--fresh", world=1, environ=launch) == [0], runs.log("run").read_text()
    assert len(runs.events("run", "resume")) == 1, "its history is continued"


def test_a_patch_that_was_made_since_is_not_set_aside_and_the_advice_leads_on(runs: Runs, copy: str, toy: Toy) -> None:
    run, log, new = runs.path(copy), runs.folder / "commands", str(runs.path("new"))
    assert runs.server.run("ledger", "revert", run, "first", "--force", output=log) == [0], log.read_text()
    made = Ledger(run / "ledger", readonly=True).entries()[-1]
    words = refused(runs, copy)
    assert f"would set aside {made.name}" in words
    assert "without the phases that were committed here (first) and their guard_after" in words

    restore, train = re.findall(r"`revpatch (.*?)`", words)
    command = [new if word == "NEW" else word for word in shlex.split(restore)]
    assert runs.server.run(*command, output=log) == [0], log.read_text()
    phases = [{"name": "second", "shards": str(toy.shards("second")), "steps": 3}]
    sets: list[dict[str, Any]] = toy.settings(runs.folder)["probes"]["sets"]
    sets = [{key: value for key, value in each.items() if key != "guard_after"} for each in sets]
    options = ["--set", f"phases={json.dumps(phases)}", "--set", f"probes.sets={json.dumps(sets)}"]
    command = [word.replace("=NEW", f"={new}").replace("CONFIG", str(runs.config)) for word in shlex.split(train)]
    assert runs.server.run(*command, *options, output=log) == [0], log.read_text()
    begun, expected = read_patch(f"{new}@start").tensors, read_patch(f"{run}@{made.name}").tensors
    assert all(torch.equal(begun[name], tensor) for name, tensor in expected.items())
    kinds = [(e.kind, e.phase) for e in Ledger(Path(new) / "ledger", readonly=True).entries()]
    assert [kind for kind in kinds if kind[0] in ("origin", "commit")] == [("origin", made.phase), ("commit", "second")]
    assert verify(Path(new)).ok and verify(run).ok


def test_a_run_that_another_process_begins_meanwhile(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = resume.lock_run

    def lock_late(directory: Path) -> object:
        (directory / "config.yaml").write_text("theirs")
        return lock(directory)

    monkeypatch.setattr(resume, "lock_run", lock_late)
    with pytest.raises(ConfigError, match="another process has begun a run there"):
        run_status(toy.config(tmp_path), fresh=False, overwrite=False)
    assert (tmp_path / "run/config.yaml").read_text() == "theirs"
