"""Shards from elsewhere: every way of getting them, faults that pass, and faults that stay: named, by every way."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from flaky_server import FlakyServer, drop, drop_unnoticed, other, slow, status
from toy_shards import BLOCKS, SHARD_BYTES, check_broken, second

from revpatch.shards import remote
from revpatch.shards.cache import ShardCache
from revpatch.shards.format import MANIFEST_NAME
from revpatch.shards.shard_set import ShardSet


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
        shards.check_sizes()
        np.testing.assert_array_equal(shards.shards_of(ids), ids // 10)


def test_locations_that_make_no_sense(cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    for location, where, told in (
        ("https://host/data", None, r"set stream\.shard_cache"),
        ("pipe:cat x.tar", cache, r"expected \{name\} in the command, found none"),
        ("https://host/data?key=1", cache, r"with '\?' or '#'.*use a command instead"),
        ("nope://data", cache, r"nope://data/manifest\.json: .*Protocol not known: nope"),
        ("s3://bucket/set", cache, r"s3://bucket/set/manifest.json: .*pip install s3fs "),
    ):
        monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
        with pytest.raises(ValueError, match=told):
            ShardSet(location, where)
    monkeypatch.setattr("webdataset.utils.enforce_security", True)
    with pytest.raises(ValueError, match="forbidden by WDS_SECURE"):
        ShardSet("pipe:cat {name}", cache)


def test_a_manifest_that_is_missing_broken_or_out_of_reach(
    folder: Path, server: FlakyServer, cache: ShardCache, tmp_path: Path
) -> None:
    server.faults[MANIFEST_NAME] = [status(503)]
    assert len(ShardSet(server.url, cache)) == 60
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
    server.close()
    with pytest.raises(ConnectionError, match=r"/manifest\.json: .*Cannot connect"):
        ShardSet(server.url, cache)


@pytest.mark.parametrize(
    ("faults", "failures"),
    [([status(503)] * 3, 3), ([drop, status(429), drop_unnoticed], 3), ([slow(0.2)], 0)],
    ids=["503 three times", "three of a kind", "slow"],
)
def test_what_passes_is_waited_for(
    faults: list[Callable],
    failures: int,
    folder: Path,
    server: FlakyServer,
    cache: ShardCache,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = second(folder).name
    server.faults[name] = list(faults)
    with ShardSet(server.url, cache) as shards, caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(shards.read(np.arange(8, 22)), BLOCKS[8:22])
    assert server.count(name) == failures + 1
    warnings = [record.getMessage() for record in caplog.records if "retry" in record.getMessage()]
    assert len(warnings) == failures
    assert all(f"{server.url}/{name}: " in text and re.search(r"retry \d of 3 in \d+.\d s", text) for text in warnings)


# Faults that stay: named, at once when known, and the other shards stay usable.


@pytest.mark.parametrize(
    ("fault", "requests", "word"),
    [
        (status(404), 1, "not found"),
        (status(503), 4, "HTTP 503"),
        (drop_unnoticed, 4, "bytes, found "),
        (other(b"x" * SHARD_BYTES), 2, "expected sha256"),
        (other(b"x" * 99999), 2, "found more"),
        (slow(8), 4, "Timeout on reading"),
    ],
    ids=["404", "503", "unnoticed drop", "other bytes", "more", "silence"],
)
def test_a_fault_that_stays_is_named(
    fault: Callable,
    requests: int,
    word: str,
    folder: Path,
    server: FlakyServer,
    cache: ShardCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "READ_SECONDS", 0.3)
    path = second(folder)
    server.always[path.name] = fault
    with ShardSet(server.url, cache) as shards:
        check_broken(shards, word)
    assert server.count(path.name) == requests
    assert not list((folder.parent / "cache").glob("*.part"))


@pytest.mark.parametrize(
    ("then", "word"),
    [
        ("cat {path}; exit 7", "exit code 7"),
        ("head -c 3172 {path}", "found 3172"),
        ("cat {path} {path}", "found more"),
    ],
)
def test_a_command_that_fails_or_ends_early(then: str, word: str, folder: Path, cache: ShardCache) -> None:
    path = second(folder)
    command = f"if [ {{name}} = {path.name} ]; then {then.format(path=path)}; else cat {folder}/{{name}}; fi"
    with ShardSet(f"pipe:{command}", cache) as shards:
        check_broken(shards, word)


def stat_of(process: Path) -> str:
    try:
        return (process / "stat").read_text()
    except OSError:  # it has ended
        return ""


@pytest.mark.parametrize("stall", ["sleep 300 | cat", "cat {path}; exec >&-; sleep 300"])
def test_a_command_that_stalls_is_killed_whole(
    stall: str, folder: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "READ_SECONDS", 0.3)
    path = second(folder)
    command = f"cat {folder}/{{name}}; [ {{name}} != {path.name} ] || {{ {stall.format(path='/dev/null')}; }}"
    with ShardSet(f"pipe:echo $$ >> {tmp_path}/pids; {command}", cache) as shards:
        check_broken(shards, "Timeout" if "|" in stall else "timed out")
    groups = (tmp_path / "pids").read_text().split()
    stats = [stat_of(process).split(") ")[-1].split() for process in Path("/proc").glob("[0-9]*")]
    assert not [stat for stat in stats if stat and stat[2] in groups and stat[0] != "Z"]
