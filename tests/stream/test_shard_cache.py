"""The cache of remote shards: its budget, its sharing between real processes, and what it does when one is killed."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flaky_server import FlakyServer, slow, status
from toy_shards import write_blocks

from revpatch.stream import remote, shard_cache
from revpatch.stream.cache_folder import CacheFolder, ShardCacheError
from revpatch.stream.manifest import Manifest
from revpatch.stream.shard_cache import ShardCache
from revpatch.stream.shard_set import ShardSet
from revpatch.stream.tars import ShardError

BLOCKS = np.random.default_rng(1).integers(0, 2**16, size=(60, 16))
SHARD_BYTES = 20480
READER = """
import os, sys
import numpy as np
from revpatch.stream.shard_cache import ShardCache
from revpatch.stream.shard_set import ShardSet

url, folder, budget, processes, reads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
children = []
for rank in range(1, processes):  # forked, as importing takes seconds
    children.append(os.fork())
    if not children[-1]:
        break
else:
    rank = 0
random = np.random.default_rng(rank if reads > 2 else 0)
with ShardCache(folder, budget, retries=3) as cache:
    shards = ShardSet(url, cache)
    for _ in range(reads):
        ids = random.integers(0, len(shards), size=4)
        line = " ".join(map(str, [*ids, *shards.read(ids)[:, 0]]))
        os.write(1, f"{line}\\n".encode())  # in one piece
sys.exit(any(os.waitpid(child, 0)[1] for child in children if rank == 0))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six shards of ten blocks."""
    manifest = write_blocks(tmp_path / "set", BLOCKS, blocks_per_shard=10)
    assert {shard.bytes for shard in manifest.shards} == {SHARD_BYTES}
    return tmp_path / "set"


@pytest.fixture
def server(folder: Path) -> Iterator[FlakyServer]:
    flaky = FlakyServer(folder)
    yield flaky
    flaky.close()


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(shard_cache, "ROOM_SECONDS", 0.3)


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


def check_output(process: subprocess.Popen, reads: int) -> None:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    lines = [list(map(int, line.split())) for line in output.splitlines()]
    assert len(lines) == reads
    for line in lines:
        assert line[4:] == BLOCKS[line[:4], 0].tolist()


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def tar_of(folder: Path, where: Path, shard: int) -> Path:
    return where / f"{Manifest.read(folder).shards[shard].sha256}.tar"


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


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
    (where / "notes.txt").write_bytes(bytes(1000))
    with ShardCache(where, 3 * SHARD_BYTES + 1000) as cache:
        shards = ShardSet(server.url, cache)
        for block in (0, 10, 20, 0, 30, 0, 40):
            shards.read(np.array([block]))
            cache.close()  # its locks would decide, instead of the order of use
            time.sleep(0.02)
    assert [tar_of(folder, where, i).exists() for i in range(6)] == [True, False, False, True, True, False]
    assert server.count("shard-000000.tar") == 1
    assert (where / "notes.txt").exists()


def test_what_a_process_no_longer_reads_makes_room_for_it(server: FlakyServer, where: Path) -> None:
    with ShardCache(where, SHARD_BYTES) as cache, ShardSet(server.url, cache) as shards:
        np.testing.assert_array_equal(shards.read(np.arange(60)), BLOCKS)
        assert size_of(where) == SHARD_BYTES


def test_a_shard_in_use_stays_and_the_error_says_what_to_do(
    folder: Path, server: FlakyServer, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "IDLE_SECONDS", 0.2)
    with ShardCache(where, SHARD_BYTES) as mine, ShardCache(where, SHARD_BYTES) as other:
        first = ShardSet(server.url, mine)
        placed = first._placed[0]
        mine.acquire(placed)
        second = ShardSet(server.url, other)
        for _ in range(2):  # not a fault of the shard, so it is not remembered as one
            with pytest.raises(
                ShardCacheError, match=f"{SHARD_BYTES} bytes.*all that is there is in use; raise stream.s"
            ):
                second.read(np.array([10]))
        assert tar_of(folder, where, 0).exists()
        np.testing.assert_array_equal(first.read(np.arange(10)), BLOCKS[:10])
        mine.release(placed)
        monkeypatch.setattr(shard_cache, "ROOM_SECONDS", 20)  # the other lets go of it when it has been idle
        np.testing.assert_array_equal(second.read(np.array([10])), BLOCKS[[10]])
        assert not tar_of(folder, where, 0).exists()


def test_budgets_that_hold_nothing(server: FlakyServer, where: Path) -> None:
    with pytest.raises(ValueError, match=r"raise stream\.shard_cache_gb"):
        ShardCache(where, 0)
    with (
        ShardCache(where, SHARD_BYTES - 1) as cache,
        pytest.raises(ShardCacheError, match=f"a shard of {SHARD_BYTES} bytes in the cache of {SHARD_BYTES - 1} bytes"),
    ):
        ShardSet(server.url, cache).read(np.array([0]))


def test_a_budget_that_is_too_small_to_read_in_turn_is_told(
    server: FlakyServer, where: Path, caplog: pytest.LogCaptureFixture
) -> None:
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


def test_only_one_may_fill_a_file(where: Path) -> None:
    mine, other = CacheFolder(where, 1000), CacheFolder(where, 1000)
    descriptor = mine.reserve("a" * 64, 600)
    assert descriptor is not None
    assert other.reserve("a" * 64, 600) is None
    with pytest.raises(BlockingIOError):
        other.reserve("b" * 64, 600)
    mine.keep("a" * 64, descriptor)
    assert other.reserve("a" * 64, 600) is None
    os.close(descriptor)
    descriptor = other.reserve("b" * 64, 600)
    assert descriptor is not None
    assert mine.open("a" * 64) is None
    other.abandon("b" * 64, descriptor)
    assert size_of(where) == 0


def test_a_second_run_fetches_nothing(server: FlakyServer, where: Path) -> None:
    for _ in range(2):
        with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
            np.testing.assert_array_equal(shards.read(np.arange(60)), BLOCKS)
    assert len([name for name in server.requests if name.endswith(".tar")]) == 6


# What goes wrong on the disk.


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], lambda data: data[:9] + b"?" + data[10:]])
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
    reader: Callable[..., subprocess.Popen], folder: Path, server: FlakyServer, where: Path
) -> None:
    for i in range(6):
        server.faults[f"shard-{i:06d}.tar"] = [slow(60)]
    process = reader(SHARD_BYTES)
    wait_for(lambda: where.is_dir() and list(where.glob("*.part")), "a fetch")
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


def test_a_full_disk_is_told(reader: Callable[..., subprocess.Popen], where: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_BYTES // 2, SHARD_BYTES // 2))

    process = reader(10**6, preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"ShardCacheError: {where}: the shard cache can't be used: File too large; free room on its disk" in errors
    assert not list(where.glob("*.part"))


def test_a_disk_that_fills_while_a_shard_is_fetched(
    server: FlakyServer, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        monkeypatch.setattr(shard_cache.os, "pwrite", full)
        with pytest.raises(ShardCacheError, match="No space left on device; free room"):
            shards.read(np.array([0]))
        monkeypatch.undo()
        assert server.count("shard-000000.tar") == 1, "trying again is no use"
        assert size_of(where) == 0
        np.testing.assert_array_equal(shards.read(np.array([0])), BLOCKS[[0]])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardCacheError, match=r"set stream\.shard_cache to another folder"):
        ShardCache(tmp_path / "file" / "cache", 10**6)


# Ahead of use.


def test_what_was_wanted_is_there_without_a_wait(server: FlakyServer, where: Path) -> None:
    for i in range(6):
        server.always[f"shard-{i:06d}.tar"] = slow(0.4)
    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        start = time.monotonic()
        for _ in range(3):
            shards.want([2, 3])
        assert time.monotonic() - start < 0.2
        wait_for(lambda: len(list(where.glob("*.tar"))) == 2, "two shards")
        start = time.monotonic()
        np.testing.assert_array_equal(shards.read(np.arange(20, 40)), BLOCKS[20:40])
        assert time.monotonic() - start < 0.2
    assert sorted(server.requests[1:]) == ["shard-000002.tar", "shard-000003.tar"]


def test_who_reads_what_is_being_fetched_ahead_waits_for_it(server: FlakyServer, where: Path) -> None:
    server.always["shard-000002.tar"] = slow(0.4)
    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        shards.want([2])
        wait_for(lambda: list(where.glob("*.part")), "a fetch")
        np.testing.assert_array_equal(shards.read(np.array([20])), BLOCKS[[20]])
    assert server.count("shard-000002.tar") == 1


def test_a_fault_ahead_is_quiet_until_the_shard_is_read(server: FlakyServer, where: Path) -> None:
    server.always["shard-000002.tar"] = status(404)
    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        shards.want([2, 3])
        wait_for(lambda: list(where.glob("*.tar")), "the shard after it")
        shards.want([2, 4])
        wait_for(lambda: len(list(where.glob("*.tar"))) == 2, "the one after that")
        assert server.count("shard-000002.tar") == 1, "nor is it asked for in vain again"
        with pytest.raises(ShardError, match="shard 2 of 6"):
            shards.read(np.array([20]))


def test_nothing_in_use_makes_room_for_what_is_only_wanted(folder: Path, server: FlakyServer, where: Path) -> None:
    with ShardCache(where, SHARD_BYTES) as cache, ShardSet(server.url, cache) as shards:
        cache.acquire(shards._placed[0])
        shards.want([1])
        time.sleep(0.3)
        assert tar_of(folder, where, 0).exists()
        assert server.count("shard-000001.tar") == 0
        cache.release(shards._placed[0])
        shards.want([1])
        np.testing.assert_array_equal(shards.read(np.array([10])), BLOCKS[[10]])


def test_no_more_files_stay_open_than_asked_and_none_after_closing(
    server: FlakyServer, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "_OPEN_FILES", 2)

    def open_copies() -> int:
        links = Path("/proc/self/fd").glob("*")
        return sum(str(link.resolve()).startswith(str(where)) for link in links)

    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        shards.read(np.arange(60))
        assert open_copies() == 2
    assert open_copies() == 0
