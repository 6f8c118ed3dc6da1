"""Fixtures: runs of one config that are rolled back once, so that a resume has that to get right too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ranks import Runs, RunServer
from toy import Toy

HARM = [[0, 6]]
"""The first phase is rolled back at its step 6."""
CHANGES: dict[str, Any] = {"snapshot": {"every": 5}, "monitoring": {"every": 4}, "probes": {"every": 3}}


@pytest.fixture(scope="module")
def make_runs(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Runs]:
    def make(**changes: Any) -> Runs:
        folder = tmp_path_factory.mktemp("runs")
        return Runs(server, toy.config_file(folder, **{**CHANGES, **changes}), folder, harm=HARM)

    return make
