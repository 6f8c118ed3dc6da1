"""Whole runs on two real ranks: guard and rollback, ranks that disagree, losses that are no number, killed ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import CHECKS, environment, rank_check, rank_pid, run, torchrun
from toy import Toy

from revpatch.ledger.ledger import Ledger
from revpatch.ledger.maintenance import verify
from revpatch.shards.format import Manifest

PROBED = {"every": 3, "sets": [{"name": "probe", "shards": "", "max_blocks": 8}]}


def events(run_folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in Ledger(run_folder / "ledger", readonly=True).journal.records() if event["event"] == kind]


def test_a_regression_is_rolled_back_and_training_goes_on(toy: Toy, tmp_path: Path) -> None:
    """Scripted probe: better at step 3, worse at 6, better at 9 and 12; in the second phase always worse."""
    probes = {**PROBED, "sets": [{**PROBED["sets"][0], "shards": str(toy.shards("base_probe")), "tolerance": 0.03}]}
    config = toy.config_file(
        tmp_path, probes=probes, rollback={"max_rollbacks": 2, "lr_factor": 0.5, "max_drift": 0.06}
    )
    found = rank_check("guarded", config)
    run_folder = tmp_path / "run"

    back = events(run_folder, "rollback")
    assert [(b["phase"], b["window"], b["to_file"]) for b in back] == [
        ("first", [4, 6], "000_first_good_step000000003.safetensors"),
        ("second", [1, 3], "001_second_start.safetensors"),
        ("second", [4, 6], "001_second_start.safetensors"),
        ("second", [7, 9], "001_second_start.safetensors"),
    ]
    assert [b["restored"]["probe"]["rise"] for b in back] == [0.0] * 4, "as it is measured after the return"
    assert found["learned"] == [[1, 2, 3, 7, 8, 9, 10, 11, 12], []], (
        "a window that hurt is neither learned nor rehearsed"
    )
    assert [p.name for p in (run_folder / "replay").iterdir()] == ["000_first"]
    assert 0 < Manifest.read(run_folder / "replay/000_first").blocks <= 8

    assert len(found["cached"]) == 4, "one for each rollback"
    assert all(before > 0 == after for before, after in found["cached"]), "the teacher's cache is emptied by each"

    rates = found["rates"]
    assert len(rates) == 12 + 9, "the first phase makes all its steps, the second stops at its third regression"
    from revpatch.config.file import load_config
    from revpatch.step.engine import learning_rate

    plain = [learning_rate(load_config(config).optimizer, step, 12) for step in range(1, 13)]
    factors = [1.0] * 6 + [0.5] * 6
    assert rates[:12] == pytest.approx([rate * factor for rate, factor in zip(plain, factors, strict=True)])

    ledger = Ledger(run_folder / "ledger", readonly=True)
    commits = [ledger.read(entry.name).tensors for entry in ledger.entries() if entry.kind == "commit"]
    starts = [ledger.read(entry.name).tensors for entry in ledger.entries() if entry.kind == "start"]
    rejected = ledger.read("000_first_rollback_step000000006.safetensors").tensors
    good = ledger.read("000_first_good_step000000012.safetensors").tensors
    assert all((commits[0][name] == good[name]).all() for name in good)
    assert all((commits[1][name] == starts[1][name]).all() for name in good), "the bad phase leaves no trace"
    assert any((rejected[name] != good[name]).any() for name in good), "the rejected patch is kept as it was"
    assert (
        found["patch"][0]
        == found["patch"][1]
        == pytest.approx(float(sum(t.double().sum() for t in commits[1].values())))
    )
    assert verify(run_folder).ok


def test_ranks_that_disagree_stop_the_run_with_both_hashes(toy: Toy, tmp_path: Path) -> None:
    config = toy.config_file(tmp_path)
    done = run([*torchrun(2), str(CHECKS), "disagreement", str(config), str(tmp_path / "out.json")])
    assert done.returncode != 0
    message = next(line for line in done.stdout.splitlines() if "the ranks disagree" in line)
    hashes = [word.strip(".;") for word in message.split() if len(word.strip(".;")) == 64]
    assert len(set(hashes)) == 2, message


@pytest.mark.parametrize("engine", ["deepspeed", "accelerate"])
def test_a_loss_that_is_no_number_is_a_regression_on_all_ranks(toy: Toy, tmp_path: Path, engine: str) -> None:
    config = toy.config_file(tmp_path, engine={"kind": engine}, monitoring={"every": 2}, probes={"every": 4})
    found = rank_check("nonfinite", config)
    assert found["finite"]
    back = events(tmp_path / "run", "rollback")
    assert [(b["phase"], b["step"], b["window"]) for b in back] == [("first", 8, [5, 8])]
    assert "not finite" in back[0]["reason"]


@pytest.mark.parametrize("sets", [[], ["second"]], ids=["no probes", "none guarded"])
def test_weights_that_are_no_numbers_are_never_good(toy: Toy, tmp_path: Path, sets: list[str]) -> None:
    named = [{"name": n, "shards": str(toy.shards(f"{n}_probe")), "guard_after": n, "tolerance": 0.5} for n in sets]
    config = toy.config_file(tmp_path, probes={"every": 6, "sets": named})
    rank_check("poisoned_last_step", config, ranks=1)
    ledger = Ledger(tmp_path / "run/ledger", readonly=True)
    assert [(b["phase"], b["window"]) for b in events(tmp_path / "run", "rollback")] == [("first", [7, 12])]
    for entry in ledger.entries():
        finite = all(bool(tensor.isfinite().all()) for tensor in ledger.read(entry.name).tensors.values())
        assert finite is (entry.kind != "rollback"), entry.name


def test_an_entry_names_the_one_its_weights_come_from(toy: Toy, tmp_path: Path) -> None:
    probes = {"every": 3, "sets": [{"name": "probe", "shards": str(toy.shards("base_probe")), "max_blocks": 8}]}
    config = toy.config_file(tmp_path, probes=probes, rollback={"max_rollbacks": 2, "max_drift": 0.06})
    rank_check("guarded", config, ranks=1)
    ledger = Ledger(tmp_path / "run/ledger", readonly=True)
    sha256 = {entry.name: entry.sha256 for entry in ledger.entries()}
    parents = {name: ledger.read(name).metadata["parent"] for name in sha256}
    good = sha256["000_first_good_step000000003.safetensors"]
    assert parents["000_first_rollback_step000000006.safetensors"] == good
    assert parents["000_first_good_step000000009.safetensors"] == good, "not the rejected patch between them"
    assert parents["001_second_start.safetensors"] == sha256["000_first_commit.safetensors"]
    assert parents["001_second_commit.safetensors"] == sha256["001_second_start.safetensors"]


def test_a_killed_rank_ends_the_run_and_leaves_a_whole_ledger(toy: Toy, tmp_path: Path) -> None:
    endless = [{"name": "first", "shards": str(toy.shards("first")), "steps": 100_000}]
    probes = {"sets": [{"name": "probe", "shards": str(toy.shards("base_probe")), "tolerance": 1.0}]}
    config = toy.config_file(tmp_path, phases=endless, probes=probes)
    command = [*torchrun(2), "-m", "revpatch", "train", str(config)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        journal = tmp_path / "run/ledger/journal.jsonl"
        while not (journal.is_file() and '"kind":"good"' in journal.read_text().replace(" ", "")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(rank_pid(process.pid, rank=1), signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    assert verify(tmp_path / "run").ok or all(
        "orphan" in p.what or "half-written" in p.what for p in verify(tmp_path / "run").problems
    )
    assert Ledger(tmp_path / "run/ledger").newest("good") is not None


def test_every_launcher_runs_the_same_command_to_the_same_commit(toy: Toy, tmp_path: Path) -> None:
    from ranks import BIN, free_port

    port = f"{free_port()}"
    launchers = {
        "deepspeed": [
            str(BIN / "deepspeed"),
            "--quiet",
            "--num_accelerators=2",
            f"--master_port={port}",
            "--module",
            "revpatch",
        ],
        "torchrun": [*torchrun(2), "-m", "revpatch"],
        "accelerate": [
            *(str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
            *(
                "--mixed_precision=no",
                "--dynamo_backend=no",
                f"--main_process_port={free_port()}",
                "--module",
                "revpatch",
            ),
        ],
    }
    config = toy.config_file(tmp_path, engine={"kind": "deepspeed"})
    commits = {}
    for name, launcher in launchers.items():
        out = tmp_path / name
        done = run([*launcher, "train", str(config), "--set", f"output_dir={out}"])
        assert done.returncode == 0, done.stdout
        assert "ranks" in done.stdout and done.stdout.count("first committed") == 1, "rank 0 alone speaks"
        commits[name] = [entry.sha256 for entry in Ledger(out / "ledger", readonly=True).entries()]
    assert commits["deepspeed"] == commits["torchrun"] == commits["accelerate"]
    single = run(
        [str(BIN / "python"), "-m", "revpatch", "train", str(config), "--set", f"output_dir={tmp_path / 'one'}"]
    )
    assert single.returncode == 0, single.stdout
    assert len(Ledger(tmp_path / "one/ledger", readonly=True).entries()) == len(commits["torchrun"])
