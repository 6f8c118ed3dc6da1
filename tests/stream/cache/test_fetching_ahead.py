"""Shards that are fetched ahead of their use: without a wait, quietly, and without pushing out what is in use."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from cached_set import BLOCKS
from flaky_server import FlakyServer, slow, status
from waiting import until

from revpatch.shards import cache as open_shards
from revpatch.shards.cache import ShardCache
from revpatch.shards.format import ShardError
from revpatch.shards.shard_set import ShardSet


def test_what_was_wanted_is_there_without_a_wait(server: FlakyServer, where: Path) -> None:
    for i in range(6):
        server.always[f"shard-{i:06d}.tar"] = slow(0.4)
    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        start = time.monotonic()
        for _ in range(3):
            shards.want([2, 3])
        assert time.monotonic() - start < 0.2
        until(lambda: len(list(where.glob("*.tar"))) == 2, "two shards")
        start = time.monotonic()
        np.testing.assert_array_equal(shards.read(np.arange(20, 40)), BLOCKS[20:40])
        assert time.monotonic() - start < 0.2
    assert sorted(server.requests[1:]) == ["shard-000002.tar", "shard-000003.tar"]


def test_who_reads_what_is_being_fetched_ahead_waits_for_it(server: FlakyServer, where: Path) -> None:
    server.always["shard-000002.tar"] = slow(0.4)
    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        shards.want([2])
        until(lambda: list(where.glob("*.part")), "a fetch")
        np.testing.assert_array_equal(shards.read(np.array([20])), BLOCKS[[20]])
    assert server.count("shard-000002.tar") == 1


def test_a_fault_ahead_is_quiet_until_the_shard_is_read(server: FlakyServer, where: Path) -> None:
    server.always["shard-000002.tar"] = status(404)
    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        shards.want([2, 3])
        until(lambda: list(where.glob("*.tar")), "the shard after it")
        shards.want([2, 4])
        until(lambda: len(list(where.glob("*.tar"))) == 2, "the one after that")
        assert server.count("shard-000002.tar") == 1, "nor is it asked for in vain again"
        with pytest.raises(ShardError, match="shard 2 of 6"):
            shards.read(np.array([20]))


def test_no_more_files_stay_open_than_asked_and_none_after_closing(
    server: FlakyServer, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_shards, "OPEN_FILES", 2)

    def open_copies() -> int:
        links = Path("/proc/self/fd").glob("*")
        return sum(str(link.resolve()).startswith(str(where)) for link in links)

    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        shards.read(np.arange(60))
        assert open_copies() == 2
    assert open_copies() == 0
