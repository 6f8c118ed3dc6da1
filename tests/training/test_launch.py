"""What a process learns from its launcher's variables."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist

from revpatch.training.launch import Launch, process_group

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


def test_one_process_can_form_a_group_of_its_own() -> None:
    with process_group(Launch.from_environment(), torch.device("cpu"), timeout_minutes=1) as peers:
        assert (peers.rank, peers.world) == (0, 1)
        assert peers.from_rank0({"a": 1}) == {"a": 1}
        assert peers.gather("mine") == ["mine"]
        assert peers.mean_(torch.tensor([2.0, 4.0])).tolist() == [2.0, 4.0]
        peers.barrier()
    assert not dist.is_initialized()


def test_the_group_is_left_when_the_run_fails() -> None:
    with pytest.raises(KeyError), process_group(Launch.from_environment(), torch.device("cpu"), timeout_minutes=1):
        raise KeyError
    assert not dist.is_initialized()


def test_a_launcher_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert Launch.from_environment() == Launch(rank=3, world=8, local_rank=1)
    assert {name: os.environ[name] for name in NAMES} == WHOLE, "nothing of it is changed"


@pytest.mark.parametrize("given", ["MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"])
def test_stray_variables_of_another_tool_make_no_launcher(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(given, WHOLE[given])
    assert Launch.from_environment() == Launch(0, 1, 0)


@pytest.mark.parametrize("missing", NAMES)
def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name, value in WHOLE.items():
        if name != missing:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"not {missing}.*torchrun"):
        Launch.from_environment()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RANK": "8"}, "RANK=8.*WORLD_SIZE-1=7"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"LOCAL_RANK": "8"}, "LOCAL_RANK=8"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "whole numbers.*two"),
        ({"RANK": ""}, "whole numbers"),
    ],
)
def test_contradictions_are_refused(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], words: str) -> None:
    for name, value in {**WHOLE, **changed}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        Launch.from_environment()


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Launch(1, 4, 1).device() == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"LOCAL_RANK=2.*2 GPUs"):
        Launch(2, 4, 2).device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Launch(2, 4, 2).device() == torch.device("cpu")
