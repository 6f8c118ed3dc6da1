"""Real ranks that are to meet: what each says when one of them is wrong, does not come, or knows other things."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Runs, RunServer
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import Toy
from waiting import until

from revpatch.base import load_base
from revpatch.patch.patched_model import base_sha256

SHORT = "engine.timeout_minutes=0.04"
"""2.4 seconds: how long a rank waits for the others."""
NONE: dict[str, None] = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


@pytest.fixture(scope="module")
def runs(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of four steps; "plain" is it, by two ranks."""
    folder = tmp_path_factory.mktemp("meeting")
    phases = [{"name": "first", "shards": str(toy.shards("first")), "steps": 4}]
    runs = Runs(server, toy.config_file(folder, phases=phases, probes={"sets": []}), folder)
    assert runs.run("plain") == [0, 0], runs.log("plain").read_text()
    return runs


@pytest.fixture(scope="module")
def taken() -> Iterator[int]:
    """A port at which something listens that never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environs", "codes", "words"),
    [
        pytest.param([{"WORLD_SIZE": 2}], [1], ["1 of 2 ranks came", "rank 1 did not", "waiting for rank 1"], id="0"),
        pytest.param([{"WORLD_SIZE": 2, "RANK": 1}], [1], ["rank 0 of 2 did not come", "refused"], id="rank 0"),
        pytest.param(
            [{"MASTER_PORT": "TAKEN"}] * 2, [2, 2], ["already in use", "does not answer as rank 0"], id="port"
        ),
        pytest.param(
            [{"WORLD_SIZE": 2, "MASTER_ADDR": "no.such.host"}], [2], ["no.such.host can't be found"], id="name"
        ),
        pytest.param([{}, {"WORLD_SIZE": 4}], [2, 2], ["WORLD_SIZE=4, and rank 0", "WORLD_SIZE=2"], id="worlds"),
        pytest.param(
            [{"WORLD_SIZE": 4}, {"WORLD_SIZE": 4}, {"WORLD_SIZE": 4, "RANK": 1, "LOCAL_RANK": 1}],
            [2, 2, 2],
            ["have RANK=1"],
            id="twice",
        ),
    ],
)
def test_a_meeting_that_fails_says_why(
    runs: Runs, taken: int, environs: list[dict[str, Any]], codes: list[int], words: list[str]
) -> None:
    named = [{key: str(value).replace("TAKEN", str(taken)) for key, value in each.items()} for each in environs]
    found = runs.run("failed", "--set", SHORT, world=len(named), environs=named)
    said = runs.log("failed").read_text()
    assert sorted(found) == codes, said
    assert not [word for word in words if word not in said], said
    assert "Traceback" not in said and "frame #" not in said
    assert all(line.startswith("revpatch") for line in said.splitlines()), said
    assert not runs.path("failed").exists()


STARTED: dict[str, list[dict[str, Any]]] = {
    "srun": [
        {**NONE, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": 2, "SLURM_STEP_ID": 0}
        | {"SLURM_JOB_ID": "FREE_PORT", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": 1}
        for rank in (0, 1)
    ],
    "mpirun": [
        {**NONE, "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        | {"OMPI_COMM_WORLD_LOCAL_SIZE": 2, "MASTER_PORT": "FREE_PORT"}
        for rank in (0, 1)
    ],
}


@pytest.mark.parametrize("name", STARTED)
def test_ranks_of_every_launcher_meet(runs: Runs, name: str) -> None:
    assert runs.run(name, environs=STARTED[name]) == [0, 0], runs.log(name).read_text()
    assert runs.commits(name) == runs.commits("plain")
    (event,) = runs.events(name, "run")
    assert (event["facts"]["ranks"], event["facts"]["threads a rank"]) == (2, 1)
    assert re.search(r"threads a rank +│ 1", runs.log(name).read_text())


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("optimizer.lr=0.02", "optimizer.lr: 0.01 on rank 0, 0.02 on rank 1"),
        ("phases.0.steps=5", "phases.0.steps: 4 on rank 0, 5 on rank 1"),
    ],
)
def test_two_ranks_with_other_configs_are_stopped(runs: Runs, option: str, words: str) -> None:
    assert runs.run("config", also={"rank": 1, "options": ["--set", option]}) == [2, 2]
    said = " ".join(runs.log("config").read_text().split())
    assert "two ranks were started with different configs" in said and words in said
    assert not runs.path("config").exists()


def test_two_ranks_with_other_shards_under_one_name_are_stopped_and_copies_are_not(runs: Runs, toy: Toy) -> None:
    """As on two nodes, each with a copy of its own."""
    swap = {"rank": 1, "path": [str(toy.shards("first")), str(toy.shards("second"))]}
    assert runs.run("shards", swap=swap) == [2, 2]
    words = runs.log("shards").read_text()
    assert "rank 0 and rank 1 found different shards" in words and "phases first" in words
    copy = shutil.copytree(toy.shards("first"), runs.folder / "copy")
    also = {"rank": 1, "options": ["--set", f"phases.0.shards={copy}"]}
    assert runs.run("copied", also=also) == [0, 0], runs.log("copied").read_text()
    assert runs.commits("copied") == runs.commits("plain")


def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def poisoned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor * float("nan") if name.endswith("ln_f.bias") else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rounded, "the ranks hold different weights"),  # which its name in patches, rounded too, does not show
        (poisoned, "rank 1 can't load the base: base.model = "),
    ],
)
def test_two_ranks_with_other_bases_under_one_name_are_stopped(
    runs: Runs, toy: Toy, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    """As on two nodes, each with a copy of its own; before the first step, and before the run's folder is made."""
    other = Path(shutil.copytree(toy.base, tmp_path / "other"))
    save_file(change(load_file(other / "model.safetensors")), other / "model.safetensors", {"format": "pt"})
    assert runs.run("base", also={"rank": 1, "options": ["--set", f"base.model={other}"]}) == [2, 2]
    said = runs.log("base").read_text()
    assert words in said and not runs.path("base").exists()
    if change is rounded:
        sha256 = [base_sha256(load_base(str(folder), None, torch.float32)) for folder in (toy.base, other)]
        assert f"{sha256[0]} on rank 0; {sha256[1]} on rank 1" in said
    else:
        assert f"base.model = {other}: {other}/model.safetensors: transformer.ln_f.bias holds numbers" in said


def test_all_ranks_say_why_no_sample_of_a_phase_could_be_kept(runs: Runs, toy: Toy) -> None:
    """Rank 0 alone reads what later phases replay."""
    new, waiting = shutil.copytree(toy.shards("first"), runs.folder / "new"), runs.folder / "sample.log.waiting"
    replay = {"target": "revpatch.train.trainer:write_replay", "call": 1}
    runs.start("sample", "--set", f"phases.0.shards={new}", wait_at=replay)
    until(waiting.exists)
    for shard in new.glob("*.tar"):
        with shard.open("r+b") as file:
            file.truncate(0)
    waiting.unlink()
    assert runs.server.wait(60) == [2, 2], runs.log("sample").read_text()
    words = runs.log("sample").read_text()
    assert "All ranks stop here" in words and "has ended" not in words
    assert not runs.events("sample", "commit")
