"""Fixtures: a set of shards, the same set over http, a cache for it, and real processes that read it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flaky_server import FlakyServer
from toy_shards import BLOCKS, READER, SHARD_BYTES, write_blocks

from revpatch.shards import remote
from revpatch.shards.cache import ShardCache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six shards of ten blocks of 16 tokens."""
    manifest = write_blocks(tmp_path / "set", BLOCKS, blocks_per_shard=10)
    assert {shard.bytes for shard in manifest.shards} == {SHARD_BYTES}
    return tmp_path / "set"


@pytest.fixture
def server(folder: Path) -> Iterator[FlakyServer]:
    """The folder over http."""
    flaky = FlakyServer(folder)
    yield flaky
    flaky.close()


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(where: Path) -> Iterator[ShardCache]:
    with ShardCache(where, 10**6) as opened:
        yield opened


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the attempts of a fetch, of which there are four."""
    monkeypatch.setattr(remote, "RETRIES", 3)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def reader(server: FlakyServer, where: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that read blocks at random, each its own if they read more than twice, else the same ones."""
    started = []

    def start(budget: int, processes: int = 1, reads: int = 1, **more: object) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", READER, server.url, str(where), str(budget), str(processes), str(reads)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
