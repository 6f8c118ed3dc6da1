"""Each check of the doctor, with conditions made for it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import torch

from revpatch.doctor import bandwidth, checks
from revpatch.doctor.checks import NAMES, Finding, launcher, versions, worst

Usage = namedtuple("Usage", "total used free")
WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV12\t{far}\tPXB\t0-31
GPU1\tNV12\t X \t{far}\tSYS\t0-31
GPU2\t{far}\t{far}\t X \tSYS\t32-63
NIC0\tPXB\tSYS\tSYS\t X

Legend:
  SYS  = Connection traversing PCIe as well as the SMP interconnect
"""


def disk_of(monkeypatch: pytest.MonkeyPatch, total: float, free: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(total * 1e9, (total - free) * 1e9, free * 1e9))


def test_advice_goes_with_what_is_not_green() -> None:
    assert worst([]) == "green"
    assert worst([Finding("a", "green", "x"), Finding("b", "yellow", "x", "y")]) == "yellow"
    assert worst([Finding("a", "red", "x", "y"), Finding("b", "yellow", "x", "y")]) == "red"
    with pytest.raises(AssertionError):
        Finding("a", "red", "x")


@pytest.mark.parametrize(
    ("total", "free", "colour"), [(0.0671, 0.0671, "red"), (8.0, 0.2, "yellow"), (8.0, 7.0, "green")]
)
def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, total: float, free: float, colour: str) -> None:
    disk_of(monkeypatch, total, free)
    found = checks.shared_memory(tmp_path)
    assert found.colour == colour
    assert colour == "green" or "--shm-size" in found.advice


def test_no_shared_memory(tmp_path: Path) -> None:
    assert checks.shared_memory(tmp_path / "shm").colour == "red"


@pytest.mark.parametrize(("free", "colour"), [(0.5, "red"), (5.0, "yellow"), (50.0, "green")])
def test_room_on_a_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, colour: str) -> None:
    disk_of(monkeypatch, 100.0, free)
    assert checks.disk("output", tmp_path / "not/there/yet", 10.0).colour == colour
    assert not (tmp_path / "not").exists(), "looking makes nothing"


def test_a_folder_that_refuses_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = checks.disk("output", tmp_path / "file", 1.0)
    assert (found.colour, "can't be written" in found.found) == ("red", True)
    found = checks.hub_cache(tmp_path / "file", offline=False)
    assert found.colour == "red"
    assert "chown" in found.advice
    assert "HF_HOME" in found.advice


def test_the_hub_s_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk_of(monkeypatch, 100.0, 50.0)
    assert checks.hub_cache(tmp_path, offline=False).colour == "green"
    assert checks.hub_cache(tmp_path, offline=True).colour == "yellow"


@pytest.mark.parametrize(("age", "colour"), [(3600.0, "red"), (30.0, "yellow")])
def test_locks_of_extensions(tmp_path: Path, age: float, colour: str) -> None:
    assert checks.extension_locks(tmp_path / "none").colour == "green"
    assert checks.extension_locks(tmp_path).colour == "green"
    lock = tmp_path / "py311_cpu/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    found = checks.extension_locks(tmp_path, now=lock.stat().st_mtime + age)
    assert found.colour == colour
    assert f"rm {lock}" in found.advice
    lock.unlink()
    lock.symlink_to(tmp_path / "gone")  # as a lock that is released between the listing and the look
    assert checks.extension_locks(tmp_path).colour == "green"


def test_folders_that_may_not_be_looked_into_are_red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret, real = tmp_path / "secret", os.stat

    def refuse(path: str | os.PathLike[str], *args: object, **options: object) -> os.stat_result:
        if str(secret) in str(path):  # root, whom the tests run as, is refused nothing
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", refuse)
    for found in (
        checks.disk("output", secret / "run", 1.0),
        checks.hub_cache(secret / "hub", offline=False),
        checks.extension_locks(secret / "extensions"),
    ):
        assert (found.colour, "Permission denied" in found.found) == ("red", True), found


@pytest.mark.parametrize(("limit", "colour"), [(100, "red"), (512, "yellow"), (65536, "green"), (-1, "green")])
def test_open_files(limit: int, colour: str) -> None:
    assert checks.open_files(limit).colour == colour


def test_bfloat16() -> None:
    found = checks.bfloat16(slow=True, on_gpu=False)
    assert (found.colour, found.advice) == ("yellow", "--set base.dtype=float32")
    assert checks.bfloat16(slow=False, on_gpu=True).colour == "green"


# Packages


def installed(**versions: str) -> object:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    return version


def test_versions() -> None:
    have = {"torch": "2.13.0+cpu", "transformers": "5.1", "deepspeed": "1", "accelerate": "1"}
    asked = lambda: ["torch>=2.10", "transformers>=5.0"]  # noqa: E731
    assert versions(asked, installed(**have)).colour == "green"  # type: ignore[arg-type]
    older = versions(asked, installed(**{**have, "torch": "2.9.0a0"}))  # type: ignore[arg-type]
    assert (older.colour, older.found) == ("yellow", "torch 2.9.0a0, not >=2.10")
    missing = versions(lambda: ["torch>=2.10", "lost>=1"], installed(**have))  # type: ignore[arg-type]
    assert (missing.colour, missing.advice) == ("red", "pip install lost")


def test_the_versions_of_this_environment_are_what_is_asked() -> None:
    found = versions()
    assert found.colour == "green", found
    assert f"torch {torch.__version__}" in found.found


# GPUs


def test_nccl_may_write_where_the_figure_is_written(tmp_path: Path) -> None:
    """As with NCCL_DEBUG=INFO, which the advice of a slow all-reduce names."""
    noisy = "print('NCCL INFO begins'); import atexit; atexit.register(print, 'NCCL INFO comm Destroy COMPLETE');"
    code = f"{noisy} from revpatch.doctor.bandwidth import main; main()"
    found = bandwidth.between_local_ranks(2, [sys.executable, "-c", code])
    assert "GB/s between 2 ranks, gloo" in found.found, found


def test_gpus() -> None:
    two = "GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)\n"
    assert checks.gpus(two, ["NVIDIA H100"] * 2).colour == "green"
    assert checks.gpus(two, ["NVIDIA H100"]).found == "torch sees 1 of 2"
    assert checks.gpus(two, []).colour == "red"
    assert checks.gpus(None, []).colour == "yellow"
    parted = f"{two}  MIG 1g.10gb     Device  0: (UUID: MIG-1)\n  MIG 1g.10gb     Device  1: (UUID: MIG-2)\n"
    assert checks.gpus(parted, ["NVIDIA H100"] * 2).colour == "green"


def test_links() -> None:
    near = checks.links(TOPOLOGY.format(far="NV12"), 3)
    assert (near.colour, near.found) == ("green", "3 x NV12")
    far = checks.links(TOPOLOGY.format(far="SYS"), 3)
    assert (far.colour, far.found) == ("yellow", "1 x NV12, 2 x SYS; through the CPU: GPU0-GPU2, GPU1-GPU2")
    assert checks.links(None, 1).colour == "green"
    assert (checks.links(None, 8).colour, checks.links("", 8).found) == ("yellow", "unknown, between 8 GPUs")


def test_a_driver_that_hangs_is_red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hangs = tmp_path / "nvidia-smi"
    hangs.write_text("#!/bin/sh\nexec sleep 60\n")
    hangs.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(checks, "_SECONDS", 0.2)
    (found,) = checks.gpus_and_links(checks.nvidia_smi, ["NVIDIA H100"])
    assert (found.colour, found.found) == ("red", "`nvidia-smi -L` does not answer within 0.2 s")
    hangs.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed: driver/library version mismatch'; exit 9\n")
    (found,) = checks.gpus_and_links(checks.nvidia_smi, [])
    assert found.colour == "yellow" and "driver/library version mismatch" in found.found and "driver" in found.advice
    assert checks.gpus_and_links(checks.nvidia_smi, ["NVIDIA H100"])[0].colour == "green"
    answers = {"-L": "GPU 0: NVIDIA H100\nGPU 1: NVIDIA H100\n", "topo": None}
    found, links = checks.gpus_and_links(lambda *words: answers[words[0]], ["NVIDIA H100"] * 2)
    assert (found.colour, links.colour) == ("green", "yellow")


# The launcher's variables


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    others = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
    for name in (*NAMES, *others, "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


LOOPBACK = {"localhost": "127.0.0.1", "debian": "127.0.1.1"}


def resolves(host: str, _: object) -> list[tuple[object, ...]]:
    address = host if host[0].isdigit() else LOOPBACK.get(host, "10.0.0.7")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]


def resolves_nothing(*_: object) -> list[object]:
    raise socket.gaierror("Name or service not known")


def test_no_launcher(environment: pytest.MonkeyPatch) -> None:
    assert launcher(os.environ).colour == "green"
    assert "RANK" not in os.environ
    environment.setenv("MASTER_ADDR", "node0")
    assert launcher(os.environ).colour == "yellow"
    environment.setenv("SLURM_PROCID", "0")
    environment.setenv("SLURM_NTASKS", "1")
    assert "left by something else" in launcher(os.environ).found, "one task is one process"
    environment.setenv("SLURM_NTASKS", "2")
    found = launcher(os.environ)
    assert (found.colour, "put srun before the command" in found.advice) == ("yellow", True)
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}.items():
        environment.setenv(name, value)
    found = launcher(os.environ, resolves)
    assert (found.colour, found.found) == ("green", "srun: rank 0 of 2, local 0, node0:20007")


@pytest.mark.parametrize(
    ("changed", "colour", "words"),
    [
        ({}, "green", ""),
        ({"RANK": "4"}, "red", "RANK=4"),
        ({"MASTER_PORT": "99999"}, "red", "no port"),
        ({"MASTER_ADDR": "localhost", "LOCAL_WORLD_SIZE": "2"}, "red", "2 ranks are on other machines"),
        ({"MASTER_ADDR": "debian", "LOCAL_WORLD_SIZE": "2"}, "red", "debian, which is 127.0.1.1 here"),
        ({"MASTER_ADDR": "debian", "SLURM_NTASKS_PER_NODE": "2"}, "red", "debian, which is 127.0.1.1 here"),
        ({"MASTER_ADDR": "node0", "LOCAL_WORLD_SIZE": "2"}, "green", ""),
        ({"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "4"}, "green", ""),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "yellow", "srun started 2 tasks, but WORLD_SIZE=4"),
    ],
)
def test_a_launcher(environment: pytest.MonkeyPatch, changed: dict[str, str], colour: str, words: str) -> None:
    for name, value in {**WHOLE, **changed}.items():
        environment.setenv(name, value)
    environment.setattr(socket, "gethostname", lambda: "node1")
    found = launcher(os.environ, resolves)
    assert found.colour == colour
    assert words in found.advice


def test_a_machine_that_takes_its_own_name_for_loopback(environment: pytest.MonkeyPatch) -> None:
    for name, value in {**WHOLE, "LOCAL_WORLD_SIZE": "2"}.items():
        environment.setenv(name, value)
    environment.setattr(socket, "gethostname", lambda: "debian")
    found = launcher(os.environ, resolves)
    assert (found.colour, "its own name debian for 127.0.1.1" in found.advice) == ("red", True)
    environment.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert launcher(os.environ, resolves).colour == "green"


def test_half_a_launcher_and_a_host_that_is_not_found(environment: pytest.MonkeyPatch) -> None:
    for name, value in WHOLE.items():
        environment.setenv(name, value)
    found = launcher(os.environ, resolves_nothing)
    assert (found.colour, "can't find 10.0.0.1" in found.advice) == ("red", True)
    environment.delenv("MASTER_ADDR")
    assert launcher(os.environ, resolves).colour == "red"


# All-reduce


def test_a_bandwidth_is_judged_by_its_backend() -> None:
    assert bandwidth.judge_bandwidth(0.7, "gloo", 2).colour == "green"
    assert bandwidth.judge_bandwidth(0.05, "gloo", 2).colour == "yellow"
    assert bandwidth.judge_bandwidth(0.7, "nccl", 2).colour == "yellow"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit('no route to host')", "no route to host"),
        ("import time; time.sleep(60)", "did not meet"),
        ("import os, time; os.environ['RANK'] == '0' and time.sleep(60); raise OSError('no GPU 1')", "no GPU 1"),
    ],
)
def test_ranks_that_do_not_meet(code: str, words: str) -> None:
    """The last: one of them dies at once, the other waits for it."""
    found = bandwidth.between_local_ranks(2, [sys.executable, "-S", "-c", code], timeout=1.0)
    assert (found.colour, words in found.found) == ("red", True), found
