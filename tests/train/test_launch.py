"""What a process learns from its launcher's variables."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist

from revpatch.distributed import Launch, read_launch
from revpatch.distributed.ranks import process_group

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        # Set and then deleted, so that what the code under test sets is taken back too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_without_a_launcher_it_is_one_process() -> None:
    assert Launch.from_environment() == Launch(rank=0, world=1, local_rank=0)
    assert [os.environ[name] for name in NAMES[:4]] == ["0", "1", "0", "127.0.0.1"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    assert Launch.from_environment() == Launch(0, 1, 0), "and asked again, it is the same"


def test_the_group_is_left_when_the_run_fails() -> None:
    with pytest.raises(KeyError), process_group(Launch.from_environment(), torch.device("cpu"), timeout_minutes=1):
        raise KeyError
    assert not dist.is_initialized()


STEP = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[03-05,7],big1",
}
OMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}
JSM = {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_LOCAL_RANK": "1"}
FLUX = {"FLUX_TASK_RANK": "3", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_NNODES": "2"}
PALS = {"PALS_RANKID": "3", "PALS_LOCAL_RANKID": "1", "PMI_RANK": "3", "PMI_SIZE": "4", "PALS_LOCAL_SIZE": "2"}
THERE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (WHOLE, "3/8 1 10.0.0.1:29500"),
        ({k: v for k, v in WHOLE.items() if k != "LOCAL_RANK"}, "3/8 0 10.0.0.1:29500"),
        ({"WORLD_SIZE": "1"}, "0/1 0"),
        (STEP, "3/4 1 node03:20123 srun"),
        ({**STEP, "SLURM_JOB_NODELIST": "rack[1-2]n[04,06]-ib"}, "3/4 1 rack1n04-ib:20123"),
        ({**STEP, **THERE, "LOCAL_RANK": "7"}, "3/4 1 10.0.0.1:29500"),
        ({**STEP, **WHOLE}, "3/8 1 10.0.0.1:29500 WORLD_SIZE=8"),
        ({**STEP, **WHOLE, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "0/1 0 train by themselves"),
        ({**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, "0/1 0"),
        ({**STEP, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"}, "0/1 0 has 8 tasks"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "0/1 0"),
        (OMPI, "1/2 1 127.0.0.1:29500 OpenMPI"),
        ({**PMI, **THERE}, "1/2 0 10.0.0.1:29500 MPICH"),
        ({**STEP, "PMI_RANK": "3", "PMI_SIZE": "4"}, "3/4 1 node03:20123 srun"),
        ({**JSM, **OMPI, **THERE}, "3/4 1 10.0.0.1:29500 jsrun"),
        ({**FLUX, "PMI_RANK": "3", "PMI_SIZE": "4", **THERE}, "3/4 1 10.0.0.1:29500 Flux"),
        ({**PALS, **THERE}, "3/4 1 10.0.0.1:29500 PALS"),
        ({"PALS_RANKID": "3", "PALS_LOCAL_RANKID": "1", **WHOLE}, "3/8 1 10.0.0.1:29500 as set"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "0/1 0 --multi_gpu"),
        ({"ACCELERATE_USE_CPU": "True"}, "0/1 0"),
        ({"MASTER_ADDR": "10.0.0.1"}, "0/1 0"),
    ],
)
def test_what_launchers_say(variables: dict[str, str], expected: str) -> None:
    launch = read_launch(variables)
    place, local, *rest = expected.split(maxsplit=2)
    assert (f"{launch.rank}/{launch.world}", str(launch.local_rank)) == (place, local)
    if launch.world > 1:
        where, *rest = rest[0].split(maxsplit=1)
        assert f"{launch.address}:{launch.port}" == where
    if rest:
        assert rest[0] in f"{launch.launcher} {launch.warning}"
    else:
        assert launch.warning is None


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({**WHOLE, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({**WHOLE, "MASTER_ADDR": ""}, "MASTER_ADDR=.*no host"),
        ({**WHOLE, "MASTER_ADDR": "node0:29500"}, "its port is MASTER_PORT"),
        ({**WHOLE, "MASTER_ADDR": "node[0-1]"}, "has more than a host"),
        ({**WHOLE, "RANK": "1.0"}, "RANK='1.0'"),
        ({**WHOLE, "RANK": "8"}, "RANK=8.*WORLD_SIZE-1=7.*unset RANK"),
        ({**WHOLE, "WORLD_SIZE": "1"}, "RANK=3.*for a single process, unset RANK"),
        ({**WHOLE, "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ({**WHOLE, "WORLD_SIZE": "two"}, "whole numbers.*two"),
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing.*unset RANK and WORLD_SIZE"),
        ({**STEP, "WORLD_SIZE": "2"}, "WORLD_SIZE=2, but srun started this process as task 3 of 4: unset"),
        ({**STEP, "SLURM_PROCID": "4"}, "task 4 of 4"),
        ({**STEP, "SLURM_JOB_NODELIST": ""}, 'export MASTER_ADDR="\\$\\(scontrol'),
        ({"SLURM_PROCID": "1"}, "SLURM_NTASKS is missing"),
        ({k: v for k, v in OMPI.items() if "LOCAL" not in k}, "mpirun -x MASTER_ADDR=HOST"),
        (PMI, "-genv MASTER_ADDR HOST"),
        (JSM, "jsrun started .* export MASTER_ADDR=HOST"),
        (FLUX, "Flux started .* export MASTER_ADDR=HOST"),
        (PALS, "PALS' mpiexec started .* export MASTER_ADDR=HOST"),
        ({"PALS_RANKID": "3", "PALS_LOCAL_RANKID": "1"}, "PMI_SIZE is missing: set RANK, WORLD_SIZE"),
        ({**{k: v for k, v in WHOLE.items() if k != "LOCAL_RANK"}, "PET_NPROC_PER_NODE": "8"}, "8 ranks a pod"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0"}, "PET_NNODES=2 asks torchrun"),
    ],
)
def test_variables_that_can_not_be_used_are_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        read_launch(variables)
    assert "\n" not in str(refused.value)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Launch(1, 4, 1).device() == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"LOCAL_RANK=2.*2 GPUs"):
        Launch(2, 4, 2).device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert Launch(3, 4, 3).device() == torch.device("cuda", 0), "as Slurm shows it: its own"
    with pytest.raises(ValueError, match=r"LOCAL_RANK=3.*1 GPUs"):
        Launch(3, 4, 3, one_environment=True).device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Launch(2, 4, 2).device() == torch.device("cpu")
