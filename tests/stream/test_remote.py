"""Shards from elsewhere: every way of getting them, every way in which that fails, and every damage, named."""

from __future__ import annotations

import logging
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from flaky_server import FlakyServer, drop, drop_unnoticed, other, slow, status
from toy_shards import write_blocks

from revpatch.stream import remote
from revpatch.stream.lanes import Lanes
from revpatch.stream.manifest import MANIFEST_NAME, Manifest
from revpatch.stream.shard_cache import ShardCache
from revpatch.stream.shard_set import ShardSet
from revpatch.stream.tars import HEADER_BYTES, ShardError, stride_of

BLOCKS = np.random.default_rng(0).integers(0, 2**16, size=(53, 16))
STRIDE = stride_of(32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six shards of ten blocks, but for the last one."""
    write_blocks(tmp_path / "set", BLOCKS, blocks_per_shard=10)
    return tmp_path / "set"


@pytest.fixture
def server(folder: Path) -> Iterator[FlakyServer]:
    flaky = FlakyServer(folder)
    yield flaky
    flaky.close()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ShardCache]:
    with ShardCache(tmp_path / "cache", 10**6, retries=3) as opened:
        yield opened


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)


def second(folder: Path) -> Path:
    return folder / Manifest.read(folder).shards[1].name


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


# Faults that stay: named, at once when known, and the other shards stay usable.


def check_broken(shards: ShardSet, *words: str, offset: int | range | None) -> ShardError:
    placed = f"{shards.location}/" if not shards.location.startswith("pipe:") else "pipe:"
    with pytest.raises(ShardError) as caught:
        shards.read(np.array([9, 14]))
    error, message = caught.value, str(caught.value)
    assert error.shard == 1
    assert error.offset in offset if isinstance(offset, range) else error.offset == offset, message
    assert error.location.startswith(placed) and "shard-000001.tar" in error.location
    assert message.startswith(f"{error.location}: shard 1 of 6: expected "), message
    if offset is not None:
        assert str(error.offset) in message, message
    for word in words:
        assert word in message, message
    np.testing.assert_array_equal(shards.read(np.array([9, 20])), BLOCKS[[9, 20]])
    start = time.monotonic()
    with pytest.raises(ShardError, match=re.escape(message)):
        shards.read(np.array([14]))
    assert time.monotonic() - start < 0.1
    return error


@pytest.mark.parametrize(
    ("fault", "requests", "word"),
    [
        (status(404), 1, "not found"),
        (status(403), 1, "HTTP 403"),
        (status(401), 1, "HTTP 401"),
        (status(503), 4, "HTTP 503"),
        (drop, 4, "ContentLengthError"),
        (drop_unnoticed, 4, "it ends at byte"),
        (other(b"x" * 99999), 2, "found more"),
    ],
    ids=["404", "403", "401", "503", "drop", "unnoticed drop", "more"],
)
def test_a_fault_that_stays_is_named(
    fault: Callable, requests: int, word: str, folder: Path, server: FlakyServer, cache: ShardCache
) -> None:
    path = second(folder)
    server.always[path.name] = fault
    size = path.stat().st_size
    third = size // 3
    offsets = {drop: range(third + 1), drop_unnoticed: third // STRIDE * STRIDE}
    offset = offsets.get(fault, size if word == "found more" else 0)
    with ShardSet(server.url, cache) as shards:
        check_broken(shards, word, offset=offset)
    assert server.count(path.name) == requests
    assert not list((folder.parent / "cache").glob("*.part"))


def test_a_server_that_falls_silent(
    folder: Path, server: FlakyServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "READ_SECONDS", 0.3)
    server.always[second(folder).name] = slow(8)
    start = time.monotonic()
    with ShardSet(server.url, cache) as shards:
        check_broken(shards, "Timeout on reading", offset=second(folder).stat().st_size // 4)
    assert time.monotonic() - start < 4


def test_a_shard_that_is_not_in_the_bucket(folder: Path, cache: ShardCache) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/holes/{path.name}", path.read_bytes())
    memory.rm_file("/holes/shard-000001.tar")
    with ShardSet("memory://holes", cache) as shards:
        check_broken(shards, "not found", offset=0)


# Commands.


@pytest.mark.parametrize(
    ("then", "word", "offset"),
    [
        ("cat {path}; exit 7", "exit code 7", None),
        ("exit 7", "exit code 7", 0),
        ("head -c 3172 {path}", "found 3172 (it ends at byte 3172", 3072),
        ("head -c 3072 {path}", "found 3072", 3072),
        ("true", "found 0", 0),
        ("cat {path} {path}", "found more", None),
        ("head -c 3072 {path}; kill -PIPE $$", "exit code -13", 3072),
    ],
)
def test_a_command_that_fails_or_ends_early(
    then: str, word: str, offset: int | None, folder: Path, cache: ShardCache
) -> None:
    path = second(folder)
    command = f"if [ {{name}} = {path.name} ]; then {then.format(path=path)}; else cat {folder}/{{name}}; fi"
    with ShardSet(f"pipe:{command}", cache) as shards:
        check_broken(shards, word, offset=path.stat().st_size if offset is None else offset)


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
        check_broken(shards, "Timeout" if "|" in stall else "timed out", offset=path.stat().st_size)
    assert time.monotonic() - start < 5
    groups = (tmp_path / "pids").read_text().split()
    stats = [stat_of(process).split(") ")[-1].split() for process in Path("/proc").glob("[0-9]*")]
    assert not [stat for stat in stats if stat and stat[2] in groups and stat[0] != "Z"]


# Damage, by every way: webdataset itself takes most of this for the end of the tar.


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


AT = 3 * STRIDE
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], int | None]] = {
    "a flipped bit in a block": (lambda data: flip(data, AT + HEADER_BYTES + 5), AT),
    "a flipped bit in the padding": (lambda data: flip(data, AT + STRIDE - 1), AT),
    "a flipped bit of no meaning in a header": (lambda data: flip(data, AT + 110), AT),
    "a flipped bit in the tar's end": (lambda data: flip(data, 10 * STRIDE + 70), 10 * STRIDE + 70),
    "two blocks": (lambda data: flip(flip(data, AT + HEADER_BYTES + 5), AT + 2 * STRIDE + 5), AT),
    "a flipped bit in a name": (lambda data: flip(data, AT + 3), AT),
    "a flipped bit in a checksum": (lambda data: flip(data, AT + 150), AT),
    "a zeroed member": (lambda data: data[:AT] + bytes(STRIDE) + data[AT + STRIDE :], AT),
    "zeroed data": (lambda data: data[: AT + 512] + bytes(512) + data[AT + STRIDE :], AT),
    "zeroed": (lambda data: bytes(len(data)), 0),
    "cut inside a member": (lambda data: data[: AT + HEADER_BYTES + 5], AT),
    "cut on a member boundary": (lambda data: data[:AT], AT),
    "cut inside a header": (lambda data: data[: AT + 100], AT),
    "cut in the tar's end": (lambda data: data[: 10 * STRIDE + 7], 10 * STRIDE + 7),
    "emptied": (lambda data: b"", 0),
    "two members swapped": (
        lambda data: data[:AT] + data[AT + STRIDE : AT + 2 * STRIDE] + data[AT : AT + STRIDE] + data[AT + 2 * STRIDE :],
        AT,
    ),
}


def locations(folder: Path, server: FlakyServer) -> dict[str, str]:
    return {"local": str(folder), "pipe": f"pipe:cat {folder}/{{name}}", "http": server.url}


@pytest.mark.parametrize("kind", ["local", "pipe", "http"])
@pytest.mark.parametrize(("damage", "offset"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_named(
    kind: str,
    damage: Callable[[bytes], bytes],
    offset: int | None,
    folder: Path,
    server: FlakyServer,
    cache: ShardCache,
) -> None:
    path = second(folder)
    path.write_bytes(damage(path.read_bytes()))
    with ShardSet(locations(folder, server)[kind], cache) as shards:
        check_broken(shards, offset=offset)


@pytest.mark.parametrize("kind", ["local", "pipe", "http"])
def test_a_swapped_shard_is_named(kind: str, folder: Path, server: FlakyServer, cache: ShardCache) -> None:
    path = second(folder)
    shutil.copy(folder / "shard-000002.tar", path)
    with ShardSet(locations(folder, server)[kind], cache) as shards:
        check_broken(shards, "expected sha256", "member '000000000020.bin' instead of 000000000010.bin", offset=0)
    assert server.count(path.name) == (2 if kind == "http" else 0), "what is whole and wrong is fetched twice"


@pytest.mark.parametrize("kind", ["local", "pipe", "http"])
def test_a_missing_shard_is_named(kind: str, folder: Path, server: FlakyServer, cache: ShardCache) -> None:
    second(folder).unlink()
    with ShardSet(locations(folder, server)[kind], cache) as shards:
        word = {"local": "a file, found nothing", "pipe": "exit code 1", "http": "not found"}[kind]
        check_broken(shards, word, offset=None if kind == "local" else 0)


# Where reading starts.


def test_a_start_at_any_step_fetches_at_most_a_shard_per_lane(server: FlakyServer, cache: ShardCache) -> None:
    with ShardSet(server.url, cache) as shards:
        lanes = Lanes(shards.manifest, lanes=2, seed=0, shuffle_blocks=1, repeat=False)
        ids = lanes.block_ids(20)
        np.testing.assert_array_equal(shards.read(ids), BLOCKS[ids])
    fetched = [name for name in server.requests if name != MANIFEST_NAME]
    assert 1 <= len(fetched) <= 2
