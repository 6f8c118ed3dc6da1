"""The cache of remote shards: its budget, its sharing between real processes, fetching ahead, faults of its disk."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flaky_server import FlakyServer, slow, status
from toy_shards import BLOCKS, SHARD_BYTES, tar_of
from waiting import until

from revpatch.shards import cache as open_shards
from revpatch.shards import remote
from revpatch.shards.cache import ShardCache, ShardCacheError
from revpatch.shards.format import ShardError
from revpatch.shards.shard_set import ShardSet

Reader = Callable[..., subprocess.Popen[str]]


def check_output(process: subprocess.Popen[str], reads: int) -> None:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    lines = [list(map(int, line.split())) for line in output.splitlines()]
    assert len(lines) == reads
    for line in lines:
        assert line[4:] == BLOCKS[line[:4], 0].tolist()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# The budget.


def test_processes_together_keep_the_budget(reader: Reader, where: Path) -> None:
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


def test_what_is_open_stays_readable_though_it_makes_room(folder: Path, server: FlakyServer, where: Path) -> None:
    with ShardCache(where, SHARD_BYTES) as mine, ShardCache(where, SHARD_BYTES) as other:
        first, second = ShardSet(server.url, mine), ShardSet(server.url, other)
        first.read(np.array([0]))
        np.testing.assert_array_equal(second.read(np.arange(10, 60)), BLOCKS[10:60])
        assert not tar_of(folder, where, 0).exists() and size_of(where) == SHARD_BYTES
        np.testing.assert_array_equal(first.read(np.arange(10)), BLOCKS[:10])
    assert server.count("shard-000000.tar") == 1


def test_budgets_that_are_too_small(
    server: FlakyServer, where: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"raise stream\.shard_cache_gb"):
        ShardCache(where, 0)
    few = SHARD_BYTES - 1
    with ShardCache(where, few) as cache, pytest.raises(ShardCacheError, match=f"{SHARD_BYTES} bytes in the cache of"):
        ShardSet(server.url, cache).read(np.array([0]))
    monkeypatch.setattr(open_shards, "OPEN_FILES", 1)
    with ShardCache(where, SHARD_BYTES) as cache, ShardSet(server.url, cache) as shards:
        for block in (0, 10, 0):
            shards.read(np.array([block]))
    assert "shard-000000.tar was fetched a second time" in caplog.text
    assert "raise stream.shard_cache_gb, or lower stream.shuffle_blocks" in caplog.text


# Sharing.


def test_processes_that_want_one_shard_fetch_it_once_and_a_later_run_not_at_all(
    reader: Reader, server: FlakyServer, where: Path
) -> None:
    for i in range(6):
        server.always[f"shard-{i:06d}.tar"] = slow(0.2)
    check_output(reader(10**6, processes=3, reads=2), 3 * 2)
    fetched = [name for name in server.requests if name.endswith(".tar")]
    assert len(fetched) == len(set(fetched)) > 0
    assert len(server.requests) == len(fetched) + 3, "and each its manifest"
    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        np.testing.assert_array_equal(shards.read(np.arange(60)), BLOCKS)
    assert len([name for name in server.requests if name.endswith(".tar")]) == 6


def test_those_who_wait_for_a_shard_that_never_comes_try_once_themselves(
    server: FlakyServer, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the ranks of one machine do; each has a cache object of its own on the one folder."""
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.3)
    monkeypatch.setattr(remote, "RETRIES", 2)
    server.always["shard-000000.tar"] = status(503)
    words = []

    def read() -> None:
        with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
            with pytest.raises(ShardError) as caught:
                shards.read(np.array([0]))
            words.append(str(caught.value))

    ranks = [threading.Thread(target=read) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert server.count("shard-000000.tar") == 3 + 3, "one attempt with two retries, and one of each other"
    assert len(words) == 4 and len(set(words)) == 1 and "HTTP 503" in words[0]


# Fetching ahead.


def test_what_was_wanted_is_fetched_in_the_background_and_who_reads_it_waits(server: FlakyServer, where: Path) -> None:
    for i in range(6):
        server.always[f"shard-{i:06d}.tar"] = slow(0.4)
    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        for _ in range(3):
            shards.want([2, 3])
        until(lambda: len(list(where.glob("*.tar"))) == 2, "two shards")
        shards.want([4])
        until(lambda: list(where.glob("*.part")), "a fetch")
        np.testing.assert_array_equal(shards.read(np.arange(20, 50)), BLOCKS[20:50])
    assert sorted(server.requests[1:]) == [f"shard-00000{i}.tar" for i in (2, 3, 4)]


# When the disk or a process fails.


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:9] + b"?" + data[10:]])
def test_a_damaged_copy_is_fetched_again(
    damage: Callable[[bytes], bytes], folder: Path, server: FlakyServer, where: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        shards.read(np.array([0]))
    copy = tar_of(folder, where, 0)
    copy.write_bytes(damage(copy.read_bytes()))
    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        np.testing.assert_array_equal(shards.read(np.arange(10)), BLOCKS[:10])
    assert server.count("shard-000000.tar") == 2
    assert "the cached copy is damaged, and is fetched again" in caplog.text


def test_a_process_killed_while_it_fetches_leaves_nothing_that_stays(
    reader: Reader, folder: Path, server: FlakyServer, where: Path
) -> None:
    for i in range(6):
        server.faults[f"shard-{i:06d}.tar"] = [slow(60)]
    process = reader(SHARD_BYTES)
    until(lambda: where.is_dir() and list(where.glob("*.part")), "a fetch")
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = where.glob("*.part")
    server.faults.clear()
    with ShardCache(where, SHARD_BYTES) as cache, ShardSet(server.url, cache) as shards:
        others = np.array([10 * i for i in range(6) if tar_of(folder, where, i).stem != left.stem])
        np.testing.assert_array_equal(shards.read(others), BLOCKS[others])
        assert not left.exists()
        np.testing.assert_array_equal(shards.read(np.arange(60)), BLOCKS)
    assert size_of(where) == SHARD_BYTES


def test_a_full_disk_and_a_folder_that_cannot_be_made_are_reported(
    reader: Reader, server: FlakyServer, where: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = (SHARD_BYTES // 2, SHARD_BYTES // 2)
    process = reader(10**6, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"ShardCacheError: {where}: the shard cache can't be used: File too large; free room on its disk" in errors
    assert not list(where.glob("*.part"))

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        for number, (module, call) in enumerate(((remote, "write_all"), (os, "fsync"))):
            name = f"shard-00000{number}.tar"
            before = server.count(name)
            with monkeypatch.context() as patch:
                patch.setattr(module, call, full)
                with pytest.raises(ShardCacheError, match="No space left on device; free room"):
                    shards.read(np.array([10 * number]))
            assert server.count(name) == before + 1, "trying again is no use"
            assert size_of(where) == 0
        np.testing.assert_array_equal(shards.read(np.array([10])), BLOCKS[[10]])
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardCacheError, match=r"set stream\.shard_cache to another folder"):
        ShardCache(tmp_path / "file" / "cache", 10**6)
