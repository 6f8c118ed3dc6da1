"""launch/slurm.sbatch under a real Slurm: told to stop, the job is queued again and goes on to its end."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from ranks import Runs, environment
from slurm import Slurm
from waiting import until

SBATCH = Path(__file__).resolve().parents[2] / "launch/slurm.sbatch"
HERE = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
"""What this machine has, instead of what the file asks for."""


def test_the_job_looks_with_doctor_where_it_is_told_to(tmp_path: Path) -> None:
    """With stubs for what Slurm and its ranks would be: doctor under the real one needs nothing more of it."""
    stubs = {"srun": 'shift; SLURM_PROCID=1 SLURM_LOCALID=1 exec "$@"'}
    stubs["python"] = 'echo "rank $SLURM_PROCID of $SLURM_NTASKS:" "$@"; printf "[%s]" "$@"'
    stubs["python"] += '; echo "$SRUN_CPUS_PER_TASK CPUs"'
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o700)
    job = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "3",
    }
    variables = {**environment(), **job, "COMMAND": "doctor"}
    variables["PATH"] = f"{tmp_path}{os.pathsep}{variables['PATH']}"
    command = ["bash", str(SBATCH), "c.yaml", "--json", "a b"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert "rank 1 of 2: -m revpatch doctor c.yaml --json a b" in done.stdout
    assert "[a b]3 CPUs" in done.stdout


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_is_queued_again_and_goes_on(launched: Runs, tmp_path: Path) -> None:
    run = launched.path("slurm")
    train = [str(launched.config), "--set", f"output_dir={run}", "--set", "phases.0.steps=100"]
    with Slurm(tmp_path) as slurm:
        job = slurm.call("sbatch", "--parsable", *HERE, str(SBATCH), *train, cwd=tmp_path)
        assert job.isdigit(), job
        log = tmp_path / f"revpatch-{job}.log"
        until(lambda: any((run / "snapshot").glob("*")), lambda: log.read_text() + slurm.said(), 300)
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
