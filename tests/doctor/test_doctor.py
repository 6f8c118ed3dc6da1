"""`revpatch doctor`: each check with conditions made for it, and the command alone and on two ranks."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import torch
from command import Call
from ranks import RunServer
from toy import Toy

from revpatch import doctor
from revpatch.distributed import NAMES
from revpatch.doctor import Examined, Places, checks, ranks, this_machine
from revpatch.doctor.checks import Finding, versions

HERE = {"versions", "GPUs", "peer access", "bfloat16", "shared memory", "output", "shard cache", "hub cache"}
"""The checks of a machine; `launcher` and `all-reduce` are those of its ranks."""


def test_room_and_rights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows: a check, 10⁹ bytes of a disk and how many of them are free, and what is found."""
    usage = namedtuple("usage", "total used free")
    file, new = tmp_path / "file", tmp_path / "not/there/yet"
    file.touch()
    for check, total, free, colour, words in (
        (lambda: checks.shared_memory(tmp_path), 0.0671, 0.0671, "red", "--shm-size"),
        (lambda: checks.shared_memory(tmp_path), 8.0, 0.2, "yellow", "--shm-size"),
        (lambda: checks.shared_memory(tmp_path), 8.0, 7.0, "green", ""),
        (lambda: checks.shared_memory(tmp_path / "none"), 8.0, 7.0, "red", "mount"),
        (lambda: checks.disk("output", new, 10.0), 100.0, 0.5, "red", "make room"),
        (lambda: checks.disk("output", new, 10.0), 100.0, 5.0, "yellow", "make room"),
        (lambda: checks.disk("output", new, 10.0), 100.0, 50.0, "green", "50.0 GB free"),
        (lambda: checks.disk("output", file, 10.0), 100.0, 50.0, "red", "can't be written"),
        (
            lambda: checks.hub_cache(file, offline=False),
            100.0,
            50.0,
            "red",
            f"with HF_HOME; sudo chown -R $USER {file}",
        ),
        (lambda: checks.hub_cache(new, offline=False), 100.0, 50.0, "green", ""),
        (lambda: checks.hub_cache(new, offline=True), 100.0, 50.0, "yellow", "HF_HUB_OFFLINE"),
    ):
        there = usage(total * 1e9, (total - free) * 1e9, free * 1e9)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, there=there: there)
        found = check()
        assert found.colour == colour and words in found.found + found.advice, found
    assert not (tmp_path / "not").exists(), "looking makes nothing"


def test_a_folder_that_may_not_be_looked_into_is_red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret, real = tmp_path / "secret", os.stat

    def refuse(path: str | os.PathLike[str], *args: object, **options: object) -> os.stat_result:
        if str(secret) in str(path):  # root, whom the tests run as, is refused nothing
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", refuse)
    found = checks.disk("output", secret / "run", 1.0)
    assert found.colour == "red" and "Permission denied" in found.found


def test_bfloat16() -> None:
    assert checks.bfloat16(slow=True, on_gpu=False).advice == "--set base.dtype=float32"
    assert checks.bfloat16(slow=False, on_gpu=True).colour == "green"


def test_versions() -> None:
    def found(asked: list[str], **installed: str) -> Finding:
        def version(name: str) -> str:
            if name not in installed:
                raise metadata.PackageNotFoundError(name)
            return installed[name]

        return versions(lambda: asked, version)

    others = {"transformers": "5.1", "deepspeed": "1", "accelerate": "1"}
    assert found(["torch>=2.10"], torch="2.13.0+cpu", **others).colour == "green"
    older = found(["torch>=2.10"], torch="2.9.0a0", **others)
    assert (older.colour, older.found) == ("yellow", "torch 2.9.0a0, not >=2.10")
    missing = found(["torch>=2.10", "lost>=1"], torch="2.13.0", **others)
    assert (missing.colour, missing.advice) == ("red", "pip install lost")
    here = versions()
    assert here.colour == "green" and f"torch {torch.__version__}" in here.found, here


LISTED = (
    "GPU 0: NVIDIA H100 (UUID: GPU-1)\n  MIG 1g.10gb     Device  0: (UUID: MIG-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)\n"
)


@pytest.mark.parametrize(
    ("usable", "driver", "colour", "words"),
    [
        (2, f"cat << END\n{LISTED}END\n", "green", "2: NVIDIA H100"),
        (1, f"cat << END\n{LISTED}END\n", "yellow", "torch sees 1 of 2"),
        (0, f"cat << END\n{LISTED}END\n", "red", "CUDA build of torch"),
        (0, "exec sleep 60", "red", "does not answer within 0.2 s"),
        (0, "echo 'driver/library version mismatch'; exit 9", "yellow", "driver/library version mismatch"),
        (1, "exit 9", "green", "1: NVIDIA H100"),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, usable: int, driver: str, colour: str, words: str
) -> None:
    """With an nvidia-smi that prints, hangs or fails."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{driver}\n")
    (tmp_path / "nvidia-smi").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(checks, "SMI_SECONDS", 0.2 if "sleep" in driver else 60)
    found = checks.gpus(["NVIDIA H100"] * usable)
    assert found.colour == colour and words in found.found + found.advice, found


def test_peer_access() -> None:
    assert checks.peer_access(1).colour == checks.peer_access(3, lambda a, b: True).colour == "green"
    found = checks.peer_access(3, lambda a, b: 2 not in (a, b))
    assert (found.colour, found.found) == ("yellow", "through the CPU: 0-2, 1-2")


# The launcher's variables

SECOND = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}
ADDRESSES = {"localhost": "127.0.0.1", "debian": "127.0.1.1"}


@pytest.mark.parametrize(
    ("variables", "colour", "words"),
    [
        ({}, "green", "none; one process"),
        ({"MASTER_ADDR": "node0"}, "yellow", "left by something else"),
        (SLURM, "yellow", "put srun before the command"),
        ({**SLURM, **STEP, "MASTER_ADDR": "node0"}, "green", "srun: rank 0 of 2, local 0, node0:20007"),
        ({**SECOND, "MASTER_ADDR": "localhost", "LOCAL_WORLD_SIZE": "4"}, "green", ""),
        ({**SECOND, "RANK": "4"}, "red", "RANK=4"),
        ({**SECOND, "MASTER_PORT": "99999"}, "red", "no port"),
        ({**SECOND, "MASTER_ADDR": "lost"}, "red", "can't find lost"),
        ({**SECOND, "MASTER_ADDR": "localhost", "LOCAL_WORLD_SIZE": "2"}, "red", "2 ranks are on other machines"),
        ({**SECOND, "MASTER_ADDR": "debian", "SLURM_NTASKS_PER_NODE": "2"}, "red", "debian, which is 127.0.1.1 here"),
        ({**SECOND, "LOCAL_WORLD_SIZE": "2"}, "red", "its own name debian for 127.0.1.1"),
        ({**SECOND, "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "eth0"}, "green", "rank 1 of 4"),
        ({**SECOND, "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "yellow", "srun started 2 tasks, but WORLD_SIZE=4"),
    ],
)
def test_a_launcher(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], colour: str, words: str) -> None:
    def resolve(host: str, _: object) -> list[tuple[object, ...]]:
        if host == "lost":
            raise socket.gaierror("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ADDRESSES.get(host, "10.0.0.7"), 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "gethostname", lambda: "debian")
    found = ranks.launcher(variables)
    assert found.colour == colour and words in found.found + found.advice, found


# All-reduce


def test_a_bandwidth_is_judged_by_its_backend() -> None:
    assert [ranks.judge_bandwidth(*row, 2).colour for row in ((0.7, "gloo"), (0.05, "gloo"), (0.7, "nccl"))] == [
        *("green", "yellow", "yellow")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "seconds", "colour", "words"),
    [
        # With NCCL_DEBUG=INFO, which the advice names, nccl writes where the figure is written.
        (
            "print('NCCL INFO'); from revpatch.doctor.ranks import main; main()",
            120,
            "green",
            "GB/s between 2 ranks, gloo",
        ),
        (
            "import os, time; os.environ['RANK'] == '0' and time.sleep(99); exit(1)",
            120,
            "red",
            "ended without a figure",
        ),
        ("import time; time.sleep(99)", 0.2, "red", "did not meet within 0.2 s"),
    ],
)
def test_ranks_of_this_machine(tmp_path: Path, script: str, seconds: float, colour: str, words: str) -> None:
    """They measure; or one of them dies and the other waits for it; or none comes."""
    (tmp_path / "rank.py").write_text(script)
    found = ranks.between_local_ranks(2, [str(tmp_path / "rank.py")], seconds)
    assert found.colour == colour and words in found.found, found


# The command


def test_a_red_finding_is_shown_first_and_is_exit_code_1(revpatch: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = {"host": [Finding("GPUs", "green", "8"), Finding("hub cache", "yellow", "few", "more")]}
    monkeypatch.setattr(doctor, "examine", lambda _: Examined(fine))
    assert revpatch("doctor").code == 0
    fine["host"].append(Finding("output", "red", "full [bold]", "make room"))
    shown = revpatch("doctor")
    assert shown.code == 1
    assert shown.out.index("full [bold]") < shown.out.index("few") < shown.out.index("GPUs")
    as_json = revpatch("doctor", "--json")
    assert as_json.code == 1
    assert [each["colour"] for each in json.loads(as_json.out)["host"]] == ["green", "yellow", "red"]


def test_what_a_config_names_is_looked_at(revpatch: Call, toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "raw.jsonl").write_text('{"text": "a"}\n')
    config = toy.config(
        tmp_path,
        output_dir=str(tmp_path / "file/run"),
        stream={"shard_cache": None},
        phases=[{"name": "raw", "shards": str(tmp_path / "raw.jsonl"), "steps": 9}],
        probes={"sets": []},
        build={"folder": str(tmp_path / "file/built")},
    )
    findings = {finding.check: finding for finding in this_machine(Places.of(config))}
    assert {findings[name].colour for name in ("output", "built shards")} == {"red"}
    assert findings.keys() == HERE - {"shard cache"} | {"built shards"}


@pytest.mark.parametrize(
    ("variables", "broken", "check", "words"),
    [
        ({"MASTER_PORT": "99999"}, None, "launcher", "99999 is no port"),
        ({}, RuntimeError("connectFullMesh failed\nat"), "all-reduce", "connectFullMesh failed"),
        ({}, ConnectionError("a rank has ended"), "all-reduce", "a rank has ended"),
    ],
)
def test_a_machine_whose_ranks_do_not_meet_says_what_it_found(
    revpatch: Call,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    broken: Exception | None,
    check: str,
    words: str,
) -> None:
    def breaks(*_: object, **__: object) -> None:
        assert broken is not None
        raise broken

    monkeypatch.setattr(doctor, "process_group", breaks)
    for name, value in {**SECOND, "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    done = revpatch("doctor", "--json")
    ((_, findings),) = json.loads(done.out).items()
    assert done.code == 1
    assert {each["check"] for each in findings} == {*HERE, "launcher", check}
    assert words in next(each["found"] + each["advice"] for each in findings if each["check"] == check)
    if broken is not None:
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert revpatch("doctor", "--json").out == "", "one rank of a machine says it"


def test_a_rank_without_a_gpu_says_so(revpatch: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu(_: object) -> None:
        raise ValueError("LOCAL_RANK=1, but this machine shows 1 GPUs")

    monkeypatch.setattr(doctor.Launch, "device", no_gpu)
    for name, value in {**SECOND, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    done = revpatch("doctor", "--json")
    assert (done.code, "this machine shows 1 GPUs" in done.out) == (1, True)


def test_two_ranks_are_looked_at_together(server: RunServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert server.run("doctor", "--json", output=out, world=2) == [0, 0], out.read_text()
    said = out.read_text()
    ((_, findings),) = json.loads(said[said.index("{") :]).items()
    assert {finding["check"] for finding in findings} == {*HERE, "launcher", "all-reduce"}
    measured = next(finding for finding in findings if finding["check"] == "all-reduce")
    assert "between 2 ranks, gloo" in measured["found"]


def test_alone_it_has_ranks_started_to_measure(revpatch: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not set(NAMES) & os.environ.keys()
    monkeypatch.setattr(ranks, "between_local_ranks", lambda count: Finding("all-reduce", "green", f"{count} ranks"))
    ((_, findings),) = revpatch("doctor", "--json").json().items()
    assert {each["check"] for each in findings} == {*HERE, "launcher", "all-reduce"}
    assert findings[-1]["found"] == f"{max(2, torch.cuda.device_count())} ranks"
