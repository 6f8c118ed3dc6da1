"""Fixtures: a set whose shards are all of one size, a folder for its cache, and real processes that read it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cached_set import BLOCKS, READER, SHARD_BYTES
from flaky_server import FlakyServer
from toy_shards import write_blocks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six shards of ten blocks."""
    manifest = write_blocks(tmp_path / "set", BLOCKS, blocks_per_shard=10)
    assert {shard.bytes for shard in manifest.shards} == {SHARD_BYTES}
    return tmp_path / "set"


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def reader(server: FlakyServer, where: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts processes that read blocks at random, each its own if they read more than twice, else the same ones."""
    started = []

    def start(budget: int, processes: int = 1, reads: int = 1, **more: object) -> subprocess.Popen:
        words = [sys.executable, "-c", READER, server.url, str(where), str(budget), str(processes), str(reads)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
