"""Ranks of which one knows what the others don't: all of them stop, and say why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import Runs
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import BLOCK_SIZE, Toy
from waiting import until

from revpatch.base import load_base
from revpatch.config.file import load_config
from revpatch.corpus.build import build_shards
from revpatch.patch.patched_model import base_sha256
from revpatch.train import resume
from revpatch.train.resume import ConfigError, run_status


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
        ("monitoring.every=3", "monitoring.every: 2 on rank 0, 3 on rank 1"),
    ],
)
def test_two_ranks_with_other_configs_are_stopped(runs: Runs, option: str, told: str) -> None:
    assert runs.run("run", also={"rank": 1, "options": ["--set", option]}) == [2, 2]
    words = " ".join(runs.log("run").read_text().split())
    assert "two ranks were started with different configs" in words and told in words
    assert not runs.path("run").exists()


def rounded(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in held.items()}


def poisoned(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor * float("nan") if name.endswith("ln_f.bias") else tensor for name, tensor in held.items()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda held: {name: tensor * 1.5 for name, tensor in held.items()}, "the ranks hold different weights"),
        (rounded, "the ranks hold different weights"),  # which its name in patches, rounded too, does not show
        (poisoned, "rank 1 can't load the base: base.model = "),
    ],
    ids=["another base", "a copy that was rounded", "a broken copy"],
)
def test_two_ranks_with_other_bases_under_one_name_are_stopped(
    runs: Runs, toy: Toy, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], told: str
) -> None:
    """As on two nodes, each with a copy of its own; before the first step, and before the run's folder is made."""
    other = Path(shutil.copytree(toy.base, tmp_path / "other"))
    save_file(change(load_file(other / "model.safetensors")), other / "model.safetensors", {"format": "pt"})
    name = change.__name__.strip("<>")
    assert runs.run(name, also={"rank": 1, "options": ["--set", f"base.model={other}"]}) == [2, 2]
    words = runs.log(name).read_text()
    assert told in words and not runs.path(name).exists()
    if "different" in told:
        held = [base_sha256(load_base(str(folder), None, torch.float32)) for folder in (toy.base, other)]
        assert f"{held[0]} on rank 0; {held[1]} on rank 1" in words
    else:
        assert f"base.model = {other}: {other}/model.safetensors: transformer.ln_f.bias holds numbers" in words


def test_a_place_may_be_another_on_another_node(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "new", tmp_path / "copy")
    also = {"rank": 1, "options": ["--set", f"phases.0.shards={tmp_path / 'copy'}"]}
    assert runs.run("run", also=also) == [0, 0], runs.log("run").read_text()


def test_all_ranks_say_why_no_sample_of_a_phase_could_be_kept(runs: Runs, tmp_path: Path) -> None:
    """Rank 0 alone reads what later phases replay."""
    waiting = runs.folder / "run.log.waiting"
    runs.start("run", wait_at={"target": "revpatch.train.trainer:write_replay", "call": 1})
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
        run_status(config, fresh=False, overwrite=False)
    assert (tmp_path / "run/config.yaml").read_text() == "theirs"
