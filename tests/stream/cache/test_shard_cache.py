"""The cache of remote shards: its budget, and its sharing between real processes."""

from __future__ import annotations

import fcntl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cached_set import BLOCKS, SHARD_BYTES, check_output, size_of, tar_of
from flaky_server import FlakyServer, slow
from waiting import until

from revpatch.shards import cache as open_shards
from revpatch.shards.cache import ShardCache, ShardCacheError
from revpatch.shards.shard_set import ShardSet

# The budget.


def test_processes_together_keep_the_budget(reader: Callable[..., subprocess.Popen], where: Path) -> None:
    budget = 4 * SHARD_BYTES + 100
    process = reader(budget, processes=3, reads=40)
    sizes = [0]

    def watch() -> None:
        while process.poll() is None:
            if (where / ".lock").exists():
                with (where / ".lock").open() as lock:  # or the listing may be of no one moment
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    sizes.append(size_of(where))
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    check_output(process, 3 * 40)
    watcher.join()
    assert 3 * SHARD_BYTES < max(sizes) <= budget
    assert size_of(where) <= budget


def test_the_least_recently_used_goes_first_and_what_others_put_there_stays(
    folder: Path, server: FlakyServer, where: Path
) -> None:
    where.mkdir()
    for name in ("notes.txt", "film.part"):
        (where / name).write_bytes(bytes(500))
    with ShardCache(where, 3 * SHARD_BYTES + 1000) as cache:
        shards = ShardSet(server.url, cache)
        for block in (0, 10, 20, 0, 30, 0, 40):
            shards.read(np.array([block]))
            cache.close()  # it is opened again at its next use, which tells the others of it
            time.sleep(0.02)
    assert [tar_of(folder, where, i).exists() for i in range(6)] == [True, False, False, True, True, False]
    assert server.count("shard-000000.tar") == 1
    assert (where / "notes.txt").exists() and (where / "film.part").exists()


def test_what_a_process_no_longer_reads_makes_room_for_it(server: FlakyServer, where: Path) -> None:
    with ShardCache(where, SHARD_BYTES) as cache, ShardSet(server.url, cache) as shards:
        np.testing.assert_array_equal(shards.read(np.arange(60)), BLOCKS)
        assert size_of(where) == SHARD_BYTES


def test_what_is_open_stays_readable_though_it_makes_room(folder: Path, server: FlakyServer, where: Path) -> None:
    with ShardCache(where, SHARD_BYTES) as mine, ShardCache(where, SHARD_BYTES) as other:
        first, second = ShardSet(server.url, mine), ShardSet(server.url, other)
        first.read(np.array([0]))
        np.testing.assert_array_equal(second.read(np.array([10])), BLOCKS[[10]])
        assert not tar_of(folder, where, 0).exists() and size_of(where) == SHARD_BYTES
        np.testing.assert_array_equal(first.read(np.arange(10)), BLOCKS[:10])
    assert server.count("shard-000000.tar") == 1


def test_what_others_fetch_is_waited_for_and_what_they_keep_there_is_not(server: FlakyServer, where: Path) -> None:
    server.always["shard-000000.tar"] = slow(0.4)
    with ShardCache(where, SHARD_BYTES + 1000) as cache, ShardSet(server.url, cache) as shards:
        shards.want([0])
        until(lambda: list(where.glob("*.part")), "a fetch")
        np.testing.assert_array_equal(shards.read(np.array([10])), BLOCKS[[10]])
        assert not list(where.glob("*.part")), "the other was done before this one began"
        (where / "notes.txt").write_bytes(bytes(2000))
        with pytest.raises(ShardCacheError, match="found none: other files take it; raise"):
            shards.read(np.array([20]))


def test_budgets_that_hold_nothing(server: FlakyServer, where: Path) -> None:
    with pytest.raises(ValueError, match=r"raise stream\.shard_cache_gb"):
        ShardCache(where, 0)
    with (
        ShardCache(where, SHARD_BYTES - 1) as cache,
        pytest.raises(ShardCacheError, match=f"a shard of {SHARD_BYTES} bytes in the cache of {SHARD_BYTES - 1} bytes"),
    ):
        ShardSet(server.url, cache).read(np.array([0]))


def test_a_budget_that_is_too_small_to_read_in_turn_is_told(
    server: FlakyServer, where: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_shards, "OPEN_FILES", 1)
    with ShardCache(where, SHARD_BYTES) as cache, ShardSet(server.url, cache) as shards:
        for block in (0, 10, 0):
            shards.read(np.array([block]))
    assert "shard-000000.tar was fetched a second time" in caplog.text
    assert "raise stream.shard_cache_gb, or lower stream.shuffle_blocks" in caplog.text


# Sharing.


def test_processes_that_want_one_shard_fetch_it_once(
    reader: Callable[..., subprocess.Popen], server: FlakyServer
) -> None:
    for i in range(6):
        server.always[f"shard-{i:06d}.tar"] = slow(0.2)
    check_output(reader(10**6, processes=3, reads=2), 3 * 2)
    fetched = [name for name in server.requests if name.endswith(".tar")]
    assert len(fetched) == len(set(fetched)) > 0
    assert len(server.requests) == len(fetched) + 3, "and each its manifest"


def test_threads_and_sets_share_too(folder: Path, server: FlakyServer, where: Path) -> None:
    server.always["shard-000001.tar"] = slow(0.2)
    with ShardCache(where, 10**6) as cache:
        sets = [
            ShardSet(server.url, cache),
            ShardSet(f"pipe:cat {folder}/{{name}}", cache),
            ShardSet(server.url, cache),
        ]
        threads = [threading.Thread(target=shards.read, args=(np.array([10]),)) for shards in sets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for shards in sets:
            np.testing.assert_array_equal(shards.read(np.arange(60)), BLOCKS)
    assert server.count("shard-000001.tar") <= 1
    assert len(list(where.glob("*.tar"))) == 6


def test_a_second_run_fetches_nothing(server: FlakyServer, where: Path) -> None:
    for _ in range(2):
        with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
            np.testing.assert_array_equal(shards.read(np.arange(60)), BLOCKS)
    assert len([name for name in server.requests if name.endswith(".tar")]) == 6
