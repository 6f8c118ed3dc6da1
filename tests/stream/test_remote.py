"""Shards from elsewhere: every way of getting them, and faults that pass."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from flaky_server import FlakyServer, drop, drop_unnoticed, other, slow, status
from remote_set import BLOCKS, second

from revpatch.shards import remote
from revpatch.shards.cache import ShardCache
from revpatch.shards.format import MANIFEST_NAME
from revpatch.shards.mixture import Lanes
from revpatch.shards.shard_set import ShardSet

# Every way of getting them.


@pytest.mark.parametrize("kind", ["http", "pipe", "memory", "file"])
def test_the_same_blocks_come_from_anywhere(kind: str, folder: Path, server: FlakyServer, cache: ShardCache) -> None:
    for path in folder.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    locations = {
        "http": f"{server.url}/",
        "pipe": f"pipe:cat '{folder}'/{{name}} | cat",
        "memory": "memory://bucket/set",
        "file": folder.as_uri(),
    }
    ids = np.array([52, 0, 9, 10, 11, 52, 30])
    with ShardSet(locations[kind], cache) as shards, ShardSet(folder) as local:
        assert shards.manifest == local.manifest
        np.testing.assert_array_equal(shards.read(ids), BLOCKS[ids])
        shards.verify()
        np.testing.assert_array_equal(shards.read(np.arange(53)), BLOCKS)
        np.testing.assert_array_equal(shards.shards_of(ids), ids // 10)
        shards.check_sizes()


def test_locations_that_make_no_sense(cache: ShardCache) -> None:
    with pytest.raises(ValueError, match=r"set stream\.shard_cache"):
        ShardSet("https://host/data")
    with pytest.raises(ValueError, match=r"expected \{name\} in the command, found none"):
        ShardSet("pipe:cat x.tar", cache)
    with pytest.raises(ValueError, match=r"with '\?' or '#'.*use a command instead"):
        ShardSet("https://host/data?key=1", cache)
    with pytest.raises(ValueError, match=r"nope://data/manifest\.json: .*Protocol not known: nope"):
        ShardSet("nope://data", cache)


def test_a_protocol_whose_package_is_missing_names_it(cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    for location, package in (("s3://bucket/set", "s3fs"), ("gs://bucket/set", "gcsfs")):
        with pytest.raises(ValueError, match=f"{location}/manifest.json: .*pip install {package} "):
            ShardSet(location, cache)


def test_commands_can_be_forbidden(cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webdataset.utils.enforce_security", True)
    with pytest.raises(ValueError, match="forbidden by WDS_SECURE"):
        ShardSet("pipe:cat {name}", cache)


def test_a_manifest_that_is_missing_broken_or_out_of_reach(
    folder: Path, server: FlakyServer, cache: ShardCache, tmp_path: Path
) -> None:
    server.faults[MANIFEST_NAME] = [status(503)]
    assert len(ShardSet(server.url, cache)) == 53
    for location in (f"{server.url}/else", "memory://bucket/else", (tmp_path / "else").as_uri()):
        server.always[MANIFEST_NAME] = status(404)
        with pytest.raises(FileNotFoundError, match=f"{location}/manifest.json: there is no manifest"):
            ShardSet(location, cache)
    server.always[MANIFEST_NAME] = other(b"<html>")
    with pytest.raises(ValueError, match=f"{server.url}/manifest.json: not valid JSON"):
        ShardSet(server.url, cache)
    server.always[MANIFEST_NAME] = status(503)
    with pytest.raises(ConnectionError, match=f"{server.url}/manifest.json: expected a file, found HTTP 503"):
        ShardSet(server.url, cache)
    with pytest.raises(ConnectionError, match="found OSError: the command ended with exit code 1"):
        ShardSet(f"pipe:cat {tmp_path}/else/{{name}} 2>/dev/null", cache)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}/manifest.json: .*Cannot connect"):
        ShardSet(f"http://127.0.0.1:{port}", cache)


# Faults that pass.


@pytest.mark.parametrize(
    "faults",
    [[status(503)] * 3, [status(429)], [drop], [drop_unnoticed], [drop, status(500), drop_unnoticed], [slow(0.4)]],
    ids=["503 three times", "429", "drop", "unnoticed drop", "three of a kind", "slow"],
)
def test_what_passes_is_waited_for(
    faults: list[Callable], folder: Path, server: FlakyServer, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    name = second(folder).name
    server.faults[name] = list(faults)
    failures = sum(fault not in ([slow]) and "slow" not in fault.__qualname__ for fault in faults)
    with ShardSet(server.url, cache) as shards, caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(shards.read(np.arange(8, 22)), BLOCKS[8:22])
    assert server.count(name) == failures + 1
    warnings = [record.getMessage() for record in caplog.records if "retry" in record.getMessage()]
    assert len(warnings) == failures
    assert all(f"{server.url}/{name}: " in text and re.search(r"retry \d of 3 in \d+.\d s", text) for text in warnings)


def test_waits_grow_and_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.5)
    monkeypatch.setattr(remote.time, "sleep", waits.append)

    def attempt() -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        remote.with_retries("x", attempt, 9)
    expected = np.minimum(0.5 * 2.0 ** np.arange(9), 30)
    assert (0.75 * expected <= waits).all() and (waits <= 1.25 * expected).all()
    assert len({wait / e for wait, e in zip(waits, expected, strict=True)}) == 9, "without jitter, ranks come together"


# Where reading starts.


def test_a_start_at_any_step_fetches_at_most_a_shard_per_lane(server: FlakyServer, cache: ShardCache) -> None:
    with ShardSet(server.url, cache) as shards:
        lanes = Lanes(shards.manifest, lanes=2, seed=0, shuffle_blocks=1, repeat=False)
        ids = lanes.block_ids(20)
        np.testing.assert_array_equal(shards.read(ids), BLOCKS[ids])
    fetched = [name for name in server.requests if name != MANIFEST_NAME]
    assert 1 <= len(fetched) <= 2
