"""Ranks of which one knows what the others don't: all of them stop, and say why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import Runs
from toy import BLOCK_SIZE, Toy
from waiting import until

from revpatch.config_file import load_config
from revpatch.stream.build import build_shards
from revpatch.training import resume
from revpatch.training.resume import ConfigError, stand


@pytest.fixture
def runs(make_runs: Callable[..., Runs], toy: Toy, tmp_path: Path) -> Runs:
    """A run whose first phase has shards of its own."""
    build_shards([toy.folder / "first.jsonl"], toy.tokenizer, BLOCK_SIZE, tmp_path / "new", max_tokens=100 * BLOCK_SIZE)
    first = {"name": "first", "shards": str(tmp_path / "new"), "steps": 9}
    return make_runs(phases=[first, {"name": "second", "shards": str(toy.shards("second")), "steps": 3}])


def test_two_ranks_with_other_shards_under_one_name_are_stopped(runs: Runs, toy: Toy, tmp_path: Path) -> None:
    """As on two nodes, each with a copy of its own."""
    other = runs.folder / "other"
    shutil.copytree(toy.shards("second"), other)
    swap = {"rank": 1, "path": [str(tmp_path / "new"), str(other)]}
    assert runs.run("run", swap=swap) == [2, 2]
    words = runs.log("run").read_text()
    assert "rank 0 and rank 1 found different shards" in words and "phases first" in words


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("optimizer.lr=0.02", "optimizer.lr: 0.01 on rank 0, 0.02 on rank 1"),
        ("phases.1.steps=4", "phases.1.steps: 3 on rank 0, 4 on rank 1"),
        ("monitoring.every=3", "monitoring.every: 4 on rank 0, 3 on rank 1"),
    ],
)
def test_two_ranks_with_other_configs_are_stopped(runs: Runs, option: str, told: str) -> None:
    assert runs.run("run", also={"rank": 1, "options": ["--set", option]}) == [2, 2]
    words = " ".join(runs.log("run").read_text().split())
    assert "two ranks were started with different configs" in words and told in words
    assert not runs.path("run").exists()


def test_a_place_may_be_another_on_another_node(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "new", tmp_path / "copy")
    also = {"rank": 1, "options": ["--set", f"phases.0.shards={tmp_path / 'copy'}"]}
    assert runs.run("run", also=also) == [0, 0], runs.log("run").read_text()


def test_all_ranks_say_why_no_sample_of_a_phase_could_be_kept(runs: Runs, tmp_path: Path) -> None:
    """Rank 0 alone reads what later phases rehearse."""
    waiting = runs.folder / "run.log.waiting"
    runs.start("run", wait_at={"target": "revpatch.training.trainer:write_replay", "call": 1})
    until(waiting.exists)
    for shard in (tmp_path / "new").glob("*.tar"):
        with shard.open("r+b") as file:
            file.truncate(0)
    waiting.unlink()
    assert runs.server.wait(60) == [2, 2], runs.log("run").read_text()
    words = runs.log("run").read_text()
    assert "All ranks stop here" in words and "has ended" not in words
    assert not runs.events("run", "commit")


def test_a_run_that_another_process_begins_meanwhile(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(toy.config_file(tmp_path), [f"output_dir={tmp_path / 'run'}"])
    lock = resume.lock_run

    def lock_late(directory: Path) -> object:
        (directory / "config.yaml").write_text("theirs")
        return lock(directory)

    monkeypatch.setattr(resume, "lock_run", lock_late)
    with pytest.raises(ConfigError, match="another process has begun a run there"):
        stand(config, fresh=False, overwrite=False)
    assert (tmp_path / "run/config.yaml").read_text() == "theirs"
