"""Whole runs: guard and rollback, ranks that disagree, losses that are no number, every launcher, killed ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ranks import BIN, Runs, RunServer, descendants, environment, free_port, rank_pid, run, torchrun
from toy import Toy
from waiting import until

from revpatch.config.file import load_config
from revpatch.ledger.ledger import Ledger, read_patch
from revpatch.ledger.maintenance import verify
from revpatch.shards.format import Manifest
from revpatch.step.engine import learning_rate


def events(run_folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in Ledger(run_folder / "ledger", readonly=True).journal.records() if event["event"] == kind]


def test_a_regression_is_rolled_back_and_training_continues(toy: Toy, server: RunServer, tmp_path: Path) -> None:
    """Scripted probe: better at step 3, worse at 6, better at 9 and 12; in the second phase always worse."""
    probe = {"name": "probe", "shards": str(toy.shards("base_probe")), "max_blocks": 8, "tolerance": 0.03}
    rollback = {"max_rollbacks": 2, "lr_factor": 0.5, "max_drift": 0.06}
    config = toy.config_file(tmp_path, probes={"every": 3, "sets": [probe]}, rollback=rollback)
    found = server.check("guarded", config)
    run_folder = tmp_path / "run"

    back = events(run_folder, "rollback")
    assert [(b["phase"], b["window"], b["to_file"]) for b in back] == [
        ("first", [4, 6], "000_first_good_step000000003.safetensors"),
        ("second", [1, 3], "001_second_start.safetensors"),
        ("second", [4, 6], "001_second_start.safetensors"),
        ("second", [7, 9], "001_second_start.safetensors"),
    ]
    assert [b["restored"]["probe"]["rise"] for b in back] == [0.0] * 4, "as it is measured after the return"
    learned = [[1, 2, 3, 7, 8, 9, 10, 11, 12], []]
    assert found["learned"] == learned, "a window that hurt is neither learned nor replayed"
    assert [p.name for p in (run_folder / "replay").iterdir()] == ["000_first"]
    assert 0 < Manifest.read(run_folder / "replay/000_first").blocks <= 8
    assert len(found["cached"]) == 4, "one for each rollback"
    assert all(before > 0 == after for before, after in found["cached"]), "the teacher's cache is emptied by each"

    rates = found["rates"]
    assert len(rates) == 12 + 9, "the first phase makes all its steps, the second stops at its third regression"
    plain = [learning_rate(load_config(config).optimizer, step, 12) for step in range(1, 13)]
    factors = [1.0] * 6 + [0.5] * 6
    assert rates[:12] == pytest.approx([rate * factor for rate, factor in zip(plain, factors, strict=True)])

    ledger = Ledger(run_folder / "ledger", readonly=True)
    patches = {entry.name: ledger.read(entry.name) for entry in ledger.entries()}
    sha256 = {entry.name: entry.sha256 for entry in ledger.entries()}
    first, second, start = (
        f"{name}.safetensors" for name in ("000_first_commit", "001_second_commit", "001_second_start")
    )
    good, rejected = "000_first_good_step000000012.safetensors", "000_first_rollback_step000000006.safetensors"

    def equal(one: str, other: str) -> bool:
        return all((patches[one].tensors[name] == tensor).all() for name, tensor in patches[other].tensors.items())

    assert equal(first, good) and equal(second, start), "the bad phase leaves no trace"
    assert not equal(rejected, good), "the rejected patch is kept as it was"
    total = float(sum(t.double().sum() for t in patches[second].tensors.values()))
    assert found["patch"][0] == found["patch"][1] == pytest.approx(total)
    parents = {name: patch.metadata["parent"] for name, patch in patches.items()}
    before = sha256["000_first_good_step000000003.safetensors"]
    assert parents[rejected] == parents["000_first_good_step000000009.safetensors"] == before, "not the rejected one"
    assert (parents[start], parents[second]) == (sha256[first], sha256[start])
    assert verify(run_folder).ok


def test_ranks_that_disagree_stop_the_run_with_both_hashes(toy: Toy, server: RunServer, tmp_path: Path) -> None:
    config, log = toy.config_file(tmp_path), tmp_path / "log"
    codes = server.run(config, tmp_path / "out.json", output=log, world=2, check="disagreement")
    assert 0 not in codes
    message = next(line for line in log.read_text().splitlines() if "the ranks disagree" in line)
    assert len(set(re.findall(r"\b[0-9a-f]{64}\b", message))) == 2, message


@pytest.mark.parametrize("engine", ["accelerate", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_loss_that_is_no_number_is_a_regression_on_all_ranks(
    toy: Toy, server: RunServer, tmp_path: Path, engine: str
) -> None:
    phases = [{"name": "first", "shards": str(toy.shards("first")), "steps": 12}]
    sets = [{"name": "base", "shards": str(toy.shards("base_probe")), "tolerance": 0.5, "max_blocks": 4}]
    knobs = {"phases": phases, "probes": {"every": 4, "sets": sets}, "monitoring": {"every": 2}}
    assert server.check("nonfinite", toy.config_file(tmp_path, engine={"kind": engine}, **knobs))["finite"]
    back = events(tmp_path / "run", "rollback")
    assert [(b["phase"], b["step"], b["window"]) for b in back] == [("first", 8, [5, 8])]
    assert "not finite" in back[0]["reason"]


def test_weights_that_are_no_numbers_are_never_good(toy: Toy, server: RunServer, tmp_path: Path) -> None:
    """Though no probe guards the phase."""
    named = [{"name": "second", "shards": str(toy.shards("second_probe")), "guard_after": "second", "tolerance": 0.5}]
    server.check("poisoned_last_step", toy.config_file(tmp_path, probes={"every": 6, "sets": named}), ranks=1)
    ledger = Ledger(tmp_path / "run/ledger", readonly=True)
    assert [(b["phase"], b["window"]) for b in events(tmp_path / "run", "rollback")] == [("first", [7, 12])]
    for entry in ledger.entries():
        finite = all(bool(tensor.isfinite().all()) for tensor in ledger.read(entry.name).tensors.values())
        assert finite is (entry.kind != "rollback"), entry.name


def test_who_measures_and_what_is_shown_change_no_commit(toy: Toy, server: RunServer, tmp_path: Path) -> None:
    """Ranks that share the probes find what rank 0 alone finds; samples and charts are for people."""
    sets = [
        {"name": "base", "shards": str(toy.shards("base_probe")), "tolerance": 0.5, "max_blocks": 7},
        {"name": "few", "shards": str(toy.shards("first_probe")), "tolerance": 1.0, "max_blocks": 3},
    ]
    phases = [{"name": "first", "shards": str(toy.shards("first")), "steps": 4}]
    runs = Runs(server, toy.config_file(tmp_path, probes={"every": 2, "sets": sets}, phases=phases), tmp_path)
    watched = ["--set", "monitoring.tensorboard=true", "--set", "monitoring.samples.max_new_tokens=4"]
    for placement, more in (("rank0", []), ("all", watched)):
        codes = runs.run(placement, "--set", f"probes.placement={placement}", *more)
        assert codes == [0, 0], runs.log(placement).read_text()
    alone, shared = (runs.events(name, "probe") for name in ("rank0", "all"))
    assert len(alone) == len(shared) == 2
    for one, other in zip(alone, shared, strict=True):
        for name in ("base", "few"):
            for key in ("loss", "rise", "gate", "patch_norm", "sparsity"):
                assert other["sets"][name][key] == pytest.approx(one["sets"][name][key], rel=1e-5, abs=1e-6), key
    one, other = (read_patch(runs.path(name)).tensors for name in ("rank0", "all"))
    assert all((one[name] == tensor).all() for name, tensor in other.items())


LAUNCHERS = {
    "deepspeed": lambda: [BIN / "deepspeed", "--num_accelerators=2", f"--master_port={free_port()}", "--module"],
    "torchrun": lambda: [*torchrun(2), "-m"],
    "accelerate": lambda: [
        *(BIN / "accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}", "--module"),
    ],
}


def command(launcher: str, config: Path, out: Path, *options: str) -> list[str]:
    words = [*LAUNCHERS[launcher](), "revpatch", "train", config, "--set", f"output_dir={out}", *options]
    return [str(word) for word in words]


@pytest.mark.slow
def test_every_launcher_runs_the_same_command_to_the_same_commit(toy: Toy, tmp_path: Path) -> None:
    phases = [{"name": "first", "shards": str(toy.shards("first")), "steps": 4}]
    config = toy.config_file(tmp_path, engine={"kind": "deepspeed"}, phases=phases, probes={"sets": []})
    commits = {}
    for name in LAUNCHERS:
        done = run(command(name, config, tmp_path / name))
        assert done.returncode == 0, done.stdout
        assert "ranks" in done.stdout and done.stdout.count("first committed") == 1, "rank 0 alone speaks"
        commits[name] = [entry.sha256 for entry in Ledger(tmp_path / name / "ledger", readonly=True).entries()]
    assert commits["deepspeed"] == commits["torchrun"] == commits["accelerate"] != []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "told"),
    [("torchrun", "the launcher"), ("deepspeed", "the ranks")],
)
def test_a_launched_run_that_is_told_to_stop_leaves_a_snapshot(
    toy: Toy, tmp_path: Path, launcher: str, told: str
) -> None:
    """A signal to the ranks is sent as the docs say: to them alone, or the launchers would end them."""
    endless = [{"name": "first", "shards": str(toy.shards("first")), "steps": 100_000}]
    sets = [{"name": "probe", "shards": str(toy.shards("base_probe")), "tolerance": 9.0, "max_blocks": 4}]
    changes = {"phases": endless, "probes": {"every": 2, "sets": sets}, "rollback": {"max_drift": 9.0}}
    config = toy.config_file(tmp_path, snapshot={"every": 10**6}, **changes)
    out, output = tmp_path / "run", tmp_path / "log"
    with output.open("w") as log:
        process = subprocess.Popen(command(launcher, config, out), env=environment(), stdout=log, stderr=log)
    try:
        until(lambda: "first 4/" in output.read_text(), output.read_text, timeout=120)
        if told == "the launcher":
            process.send_signal(signal.SIGTERM)
        else:
            docs = (Path(__file__).parents[2] / "docs/OPERATIONS.md").read_text("utf-8")
            (pattern,) = set(re.findall(r"pkill -TERM -f '([^']+)'", " ".join(docs.split())))
            matched = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()
            ranks = {int(pid) for pid in matched} & set(descendants(process.pid))
            assert ranks == {rank_pid(process.pid, rank) for rank in (0, 1)}
            for pid in ranks:
                os.kill(pid, signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
    assert code == 75 if told == "the ranks" else code != 0, output.read_text()
    assert len(events(out, "interrupted")) == len(list((out / "snapshot").iterdir())) == 1
