"""Faults of remote shards that stay, and every damage, by every way: named, and the other shards stay usable."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from damage import damage
from flaky_server import FlakyServer, drop, drop_unnoticed, other, slow, status
from remote_set import check_broken, second

from revpatch.shards import remote
from revpatch.shards.cache import ShardCache
from revpatch.shards.shard_set import ShardSet

# Named, at once when known, and the other shards stay usable.


@pytest.mark.parametrize(
    ("fault", "requests", "word"),
    [
        (status(404), 1, "not found"),
        (status(403), 1, "HTTP 403"),
        (status(401), 1, "HTTP 401"),
        (status(503), 4, "HTTP 503"),
        (drop, 4, "ContentLengthError"),
        (drop_unnoticed, 4, "bytes, found "),
        (other(b"x" * 99999), 2, "found more"),
    ],
    ids=["404", "403", "401", "503", "drop", "unnoticed drop", "more"],
)
def test_a_fault_that_stays_is_named(
    fault: Callable, requests: int, word: str, folder: Path, server: FlakyServer, cache: ShardCache
) -> None:
    path = second(folder)
    server.always[path.name] = fault
    with ShardSet(server.url, cache) as shards:
        check_broken(shards, word)
    assert server.count(path.name) == requests
    assert not list((folder.parent / "cache").glob("*.part"))


def test_a_server_that_falls_silent(
    folder: Path, server: FlakyServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "READ_SECONDS", 0.3)
    server.always[second(folder).name] = slow(8)
    start = time.monotonic()
    with ShardSet(server.url, cache) as shards:
        check_broken(shards, "Timeout on reading")
    assert time.monotonic() - start < 4


def test_a_shard_that_is_not_in_the_bucket(folder: Path, cache: ShardCache) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/holes/{path.name}", path.read_bytes())
    memory.rm_file("/holes/shard-000001.tar")
    with ShardSet("memory://holes", cache) as shards:
        check_broken(shards, "not found")


# Commands.


@pytest.mark.parametrize(
    ("then", "word"),
    [
        ("cat {path}; exit 7", "exit code 7"),
        ("exit 7", "exit code 7"),
        ("head -c 3172 {path}", "found 3172"),
        ("true", "found 0"),
        ("cat {path} {path}", "found more"),
        ("head -c 3072 {path}; kill -PIPE $$", "exit code -13"),
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
    start = time.monotonic()
    with ShardSet(f"pipe:echo $$ >> {tmp_path}/pids; {command}", cache) as shards:
        check_broken(shards, "Timeout" if "|" in stall else "timed out")
    assert time.monotonic() - start < 5
    groups = (tmp_path / "pids").read_text().split()
    stats = [stat_of(process).split(") ")[-1].split() for process in Path("/proc").glob("[0-9]*")]
    assert not [stat for stat in stats if stat and stat[2] in groups and stat[0] != "Z"]


# Damage, by every way.


def locations(folder: Path, server: FlakyServer) -> dict[str, str]:
    return {"local": str(folder), "pipe": f"pipe:cat {folder}/{{name}}", "http": server.url}


@pytest.mark.parametrize("kind", ["local", "pipe", "http"])
@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("a flipped bit in the padding", "expected sha256"),
        ("swapped", "expected sha256"),
        ("cut on a member boundary", "bytes, found 3072"),
        ("emptied", "bytes, found 0"),
        ("longer", "bytes, found "),
        ("missing", ""),
    ],
)
def test_damage_is_named(kind: str, how: str, word: str, folder: Path, server: FlakyServer, cache: ShardCache) -> None:
    path = second(folder)
    damage(path, how)
    missing = {"local": "a file, found nothing", "pipe": "exit code 1", "http": "not found"}
    with ShardSet(locations(folder, server)[kind], cache) as shards:
        check_broken(shards, word or missing[kind])
    if kind == "http" and word == "expected sha256":
        assert server.count(path.name) == 2, "what is whole and wrong is fetched twice"
