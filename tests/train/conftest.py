"""Fixtures: runs of one config that are rolled back once, so that a resume has that to get right too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ranks import Runs, RunServer
from toy import Toy

HARM = [[0, 4]]
"""The first phase is rolled back at its step 4."""


@pytest.fixture(scope="module")
def make_runs(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Runs]:
    """make_runs(**changes): runs of phases of 8 and 4 steps, in a folder of their own."""

    def make(**changes: Any) -> Runs:
        folder = tmp_path_factory.mktemp("runs")
        steps = {"first": 8, "second": 4}
        phases = [{"name": name, "shards": str(toy.shards(name)), "steps": steps[name]} for name in steps]
        plain = {"phases": phases, "snapshot": {"every": 3}, "monitoring": {"every": 2}, "probes": {"every": 2}}
        return Runs(server, toy.config_file(folder, **{**plain, **changes}), folder, harm=HARM)

    return make
