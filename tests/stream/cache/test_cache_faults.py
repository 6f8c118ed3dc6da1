"""The cache of remote shards when its disk or a process fails: a damaged copy, a kill, a full disk."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cached_set import BLOCKS, SHARD_BYTES, size_of, tar_of
from flaky_server import FlakyServer, slow, status
from waiting import until

from revpatch.shards import remote
from revpatch.shards.cache import ShardCache, ShardCacheError
from revpatch.shards.format import ShardError
from revpatch.shards.shard_set import ShardSet


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
    server.always.clear()
    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        np.testing.assert_array_equal(shards.read(np.arange(10)), BLOCKS[:10])


def test_a_full_disk_is_told(reader: Callable[..., subprocess.Popen], where: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_BYTES // 2, SHARD_BYTES // 2))

    process = reader(10**6, preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"ShardCacheError: {where}: the shard cache can't be used: File too large; free room on its disk" in errors
    assert not list(where.glob("*.part"))


@pytest.mark.parametrize(("module", "call"), [(remote, "write_all"), (os, "fsync")])
def test_a_disk_that_fills_while_a_shard_is_fetched(
    module: object, call: str, server: FlakyServer, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with ShardCache(where, 10**6) as cache, ShardSet(server.url, cache) as shards:
        monkeypatch.setattr(module, call, full)
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
