"""Real ranks that are to meet: what each is told when one of them is wrong or does not come."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from ranks import Runs, RunServer
from toy import Toy

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
        pytest.param(
            [{"WORLD_SIZE": 2, "MASTER_ADDR": "240.0.0.1"}], [2], ["240.0.0.1 does not lead to"], id="address"
        ),
        pytest.param([{}, {"WORLD_SIZE": 4}], [2, 2], ["WORLD_SIZE=4, and rank 0", "WORLD_SIZE=2"], id="worlds"),
        pytest.param(
            [{"WORLD_SIZE": 4}, {"WORLD_SIZE": 4}, {"WORLD_SIZE": 4, "RANK": 1, "LOCAL_RANK": 1}],
            [2, 2, 2],
            ["have RANK=1"],
            id="twice",
        ),
        pytest.param([{}, {"RANK": 0}], [1, 2], ["second process with RANK=0", "rank 1 did not"], id="zeros"),
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
    "Kubeflow": [{"LOCAL_RANK": None, "PET_NPROC_PER_NODE": "auto"}] * 2,
}


@pytest.mark.parametrize("name", STARTED)
def test_ranks_of_every_launcher_meet(runs: Runs, name: str) -> None:
    assert runs.run(name, environs=STARTED[name]) == [0, 0], runs.log(name).read_text()
    assert runs.commits(name) == runs.commits("plain")
    (event,) = runs.events(name, "run")
    assert (event["facts"]["ranks"], event["facts"]["threads a rank"]) == (2, 1)
    assert re.search(r"threads a rank +│ 1", runs.log(name).read_text())


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_JOB_ID": 7, "SLURM_NTASKS": 8, "SLURM_PROCID": 0}, "this Slurm job has 8 tasks"),
        ({"ACCELERATE_USE_CPU": True, "MASTER_PORT": 29500}, "add --multi_gpu"),
    ],
)
def test_a_single_rank_that_may_have_been_meant_to_be_more(runs: Runs, variables: dict[str, Any], words: str) -> None:
    environs = [{**NONE, **variables}]
    assert runs.run("single", "--fresh", "--overwrite", world=1, environs=environs) == [0]
    assert words in (runs.path("single") / "train.log").read_text()
    assert "single rank" in runs.log("single").read_text()
