"""Training from the command line, as a person meets it: a real small run, and plain words for mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import Call, Result, one_line
from toy import Toy
from trained_run import Run

from revpatch.cli import main
from revpatch.config.file import load_config
from revpatch.ledger.patch_file import read_entry

NOISE = re.compile(r"warn|deprecat|traceback|it/s\]|\[W\d|\[rank\d|/site-packages/", re.IGNORECASE)
"""What libraries say of themselves; a run's own words have none of it."""


def test_a_run_ends_well_and_says_nothing_but_its_own_words(run: Run) -> None:
    assert run.result.code == 0, run.result
    assert run.result.err == ""
    noise = [line for line in run.result.out.splitlines() if NOISE.search(line)]
    assert not noise, noise
    for word in ("ranks", "engine", "deepspeed, ZeRO 0", "trainable parameters", "frozen parameters", "inverse error"):
        assert word in run.result.out
    assert run.result.out.count(str(run.directory)) == 1
    assert f"{run.directory.name}: held-out losses" in run.result.out
    assert "first committed" in run.result.out
    assert "second committed" in run.result.out


def test_the_run_keeps_its_config_and_what_the_terminal_showed(run: Run) -> None:
    assert load_config(run.directory / "config.yaml") == load_config(run.config, run.overrides)
    written = [line.split(" ", 2)[2] for line in (run.directory / "train.log").read_text("utf-8").splitlines()]
    shown = run.result.out.splitlines()
    assert len(written) > 10
    assert [line for line in written if line not in shown] == []


def test_commits_learned_their_corpora(run: Run) -> None:
    losses = {
        name: read_entry(run.entry(name))[1]["probes"]
        for name in ("000_first_start.safetensors", "001_second_commit.safetensors")
    }
    assert losses["001_second_commit.safetensors"]["first"] < losses["000_first_start.safetensors"]["first"] - 0.1
    assert losses["001_second_commit.safetensors"]["second"] < losses["000_first_start.safetensors"]["second"] - 0.1


def test_a_folder_that_holds_something_is_refused_and_left_as_it_is(toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    taken = tmp_path / "run"
    taken.mkdir()
    (taken / "thesis.txt").write_text("ten years of work", encoding="utf-8")
    words = "output_dir", taken, "neither an empty folder nor a run", "another folder"
    one_line(revpatch("train", toy.config_file(tmp_path)), *words)
    assert [path.read_text(encoding="utf-8") for path in taken.iterdir()] == ["ten years of work"]


def test_mistakes_in_a_config_are_told_in_words(toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    config = toy.config_file(tmp_path)
    one_line(revpatch("train", tmp_path / "none.yaml"), tmp_path / "none.yaml", "no such file")
    one_line(revpatch("train", config, "--set", "optimizer.lr"), "--set", "section.key=value")
    one_line(revpatch("train", config, "--set", "batch.new_blocks=3", "--set", "batch.micro_blocks=1"), "micro_blocks")
    one_line(revpatch("train", config, "--set", "phases.0.shards=nowhere"), "phases.0.shards", "nowhere")
    result = revpatch("train", config, "--set", "optimizer.rate=3", "--set", "seed=x")
    assert result.code == 2
    assert result.err.splitlines()[0] == f"revpatch: config {config}: 2 mistake(s)"
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_config_is_said_once_a_machine(
    revpatch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for command in ("train", "doctor"):
        assert revpatch(command, tmp_path / "none.yaml") == Result(2, "", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "none.yaml" in revpatch("doctor", tmp_path / "none.yaml").err


def test_what_one_rank_meets_it_says(revpatch: Call, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    config = toy.config_file(tmp_path, replay={"base": str(tmp_path / "nowhere")})
    found = revpatch("train", config)
    assert found.code == 2
    assert "rank 1 on" in found.err
    assert "nowhere" in found.err


def test_a_developer_can_have_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVPATCH_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["revpatch", "train", str(tmp_path / "none.yaml")])
    with pytest.raises(FileNotFoundError):
        main()


def test_warnings_of_libraries_are_kept_from_the_person_and_errors_are_not() -> None:
    code = (
        "from revpatch.terminal import quiet_libraries; quiet_libraries(); import logging, warnings;"
        "warnings.warn('noise'); warnings.warn('noise', FutureWarning);"
        "names = ['DeepSpeed', 'transformers.x', 'accelerate', 'torch.distributed.run'];"
        "[logging.getLogger(name).warning('noise') for name in names];"
        "[logging.getLogger(name).error('trouble') for name in names]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "noise" not in done.stderr + done.stdout
    assert done.stderr.count("trouble") == 4
