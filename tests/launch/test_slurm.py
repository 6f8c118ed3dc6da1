"""launch/slurm.sbatch under a real Slurm: told to stop, the job is queued again and goes on to its end."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from ranks import Runs
from slurm import Slurm

SBATCH = Path(__file__).resolve().parents[2] / "launch/slurm.sbatch"
HERE = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
"""What this machine has, instead of what the file asks for."""


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_is_queued_again_and_goes_on(launched: Runs, tmp_path: Path) -> None:
    run = launched.path("slurm")
    train = [str(launched.config), "--set", f"output_dir={run}", "--set", "phases.0.steps=100"]
    with Slurm(tmp_path) as slurm:
        job = slurm.call("sbatch", "--parsable", *HERE, str(SBATCH), *train, cwd=tmp_path)
        assert job.isdigit(), job
        log = tmp_path / f"revpatch-{job}.log"
        until = time.monotonic() + 300
        while not (run / "snapshot").is_dir() or not any((run / "snapshot").iterdir()):
            assert time.monotonic() < until, log.read_text() + slurm.said()
            time.sleep(0.05)
        # As `--signal=USR1@300` does it near the end of the job's time: to the ranks, not to the script.
        slurm.call("scancel", "--signal=USR1", job)
        slurm.wait(job, "COMPLETED", within=300)
    said = log.read_text()
    assert f"job {job}, start 1" in said
    assert "interrupted; queued again" in said
    assert f"job {job}, start 2" in said
    events = [json.loads(line)["event"] for line in (run / "ledger/journal.jsonl").read_text().splitlines()]
    assert (events.count("interrupted"), events.count("resume")) == (1, 1), said
    assert len(launched.commits("slurm")) == 1
