"""What the launchers are tested on: a tiny run, and what it ends with when two ranks are started without them."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import Runs, RunServer
from toy import Toy


@pytest.fixture(scope="session")
def launched(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One phase of 8 steps with a snapshot every other; its first run is "plain", by two forked ranks."""
    folder = tmp_path_factory.mktemp("launched")
    config = toy.config_file(
        folder,
        phases=[{"name": "first", "shards": str(toy.shards("first")), "steps": 8}],
        snapshot={"every": 2},
        probes={"sets": [{"name": "base", "shards": str(toy.shards("base_probe")), "tolerance": 0.5, "max_blocks": 8}]},
        engine={"kind": "deepspeed", "timeout_minutes": 2},
    )
    runs = Runs(server, config, folder)
    assert runs.run("plain") == [0, 0], runs.log("plain").read_text()
    assert len(runs.commits("plain")) == 1
    return runs


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"
