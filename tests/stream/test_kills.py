"""Builds in processes of their own: killed, stopped, two at once, out of room, with any number of workers."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import make_text
from waiting import until

from revpatch.corpus.build import build_shards
from revpatch.shards.format import Manifest

ROOT = Path(__file__).resolve().parents[2]
BUILD = """
import json, sys
import revpatch.corpus.build, revpatch.corpus.chunks
from light_tokenizer import LightTokenizer

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    revpatch.corpus.build.CHECKPOINT_SECONDS = 0.0
    revpatch.corpus.chunks.CHUNK_DOCUMENTS = arguments.pop("chunk", 20)
    revpatch.corpus.chunks.LONG_CHARACTERS = 20_000
    revpatch.corpus.chunks.PIECE_CHARACTERS = 3_000
    tokenizer = LightTokenizer(arguments.pop("tokenizer"))
    def progress(p):
        print(p.tokens, flush=True)
    try:
        revpatch.corpus.build.build_shards(tokenizer=tokenizer, progress=progress, **arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Several files, among them long texts of both kinds and lines that can't be read, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    text = folder / "text"
    text.mkdir()
    for part in range(3):
        lines = [json.dumps({"text": make_text(part * 1000 + i)}) + "\n" for i in range(400)]
        lines[100] = "no json\n"
        lines[200] = json.dumps({"text": " ".join(make_text(i) for i in range(700)), "n": part}) + "\n"
        (text / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        (text / f"{part}.txt").write_text(" ".join(make_text(i) for i in range(part, 900)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def start(corpus: Path) -> Start:
    """start(out, **arguments): a build of the corpus in a process of its own; it prints a line for each chunk."""
    script = corpus / "script.py"
    script.write_text(BUILD)

    def run(out: Path, limit: int | None = None, **more: Any) -> subprocess.Popen[str]:
        arguments = {
            "sources": [str(corpus / "text")],
            "tokenizer": str(corpus / "tokenizer.json"),
            "block_size": 16,
            "out": str(out),
            "holdout": 0.2,
            "blocks_per_shard": 300,
            "on_bad": "skip",
            **more,
        }
        return subprocess.Popen(
            [sys.executable, str(script), json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests/stream"},
            preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
        )

    return run


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted build."""
    out = tmp_path_factory.mktemp("whole") / "set"
    process = start(out)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(Manifest.read(out).shards) > 3
    assert [bad.partition(" ")[0] for bad in Manifest.read(out).bad] == [f"{part}.jsonl:101:" for part in range(3)]
    return files_of(out)


def files_of(out: Path) -> dict[str, bytes]:
    """The files of a set and of its probe."""
    folders = (out, out.with_name(f"{out.name}_probe"))
    return {f"{folder.name}/{path.name}": path.read_bytes() for folder in folders for path in folder.iterdir()}


def lines_until(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(
    start: Start, whole: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "set"
    before = 0
    for chunks in (1, 9, 30):
        process = start(out, workers=workers)
        tokens = int(lines_until(process, chunks)[-1])
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists(), "the name is there only when the set is whole"
        assert tokens > before, "it went on instead of beginning anew"
        before = tokens
    process = start(out, workers=3 - workers, chunk=7)
    said, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert int(said.split()[0]) > before // 2
    assert files_of(out) == whole
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_killing_while_it_is_installed_is_made_good(
    start: Start, whole: dict[str, bytes], tmp_path: Path, corpus: Path, tokenizer: Any, monkeypatch: Any
) -> None:
    """Between the two renames, as a signal can't be timed to fall there."""
    out = tmp_path / "set"
    build: dict[str, Any] = {"block_size": 16, "holdout": 0.2, "blocks_per_shard": 300, "on_bad": "skip"}

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    import revpatch.corpus.build as module

    real, calls = module.install_folder, []

    def once(*arguments: Any) -> None:
        if calls:
            interrupted()
        calls.append(1)
        real(*arguments)

    monkeypatch.setattr(module, "install_folder", once)
    with pytest.raises(KeyboardInterrupt):
        build_shards(corpus / "text", tokenizer, out=out, **build)
    assert not out.exists()
    assert (tmp_path / "set_probe").exists()
    monkeypatch.setattr(module, "install_folder", real)
    monkeypatch.setattr(module, "encode_in_order", lambda *_: pytest.fail("nothing is left to encode"))
    (tmp_path / "set_probe").rename(tmp_path / "away")
    with pytest.raises(
        FileNotFoundError, match=r"set_probe: .* now it is gone: put it back, or delete .*\.set\.building"
    ):
        build_shards(corpus / "text", tokenizer, out=out, **build)
    assert not out.exists(), "a set without its probe would look whole"
    (tmp_path / "away").rename(tmp_path / "set_probe")
    build_shards(corpus / "text", tokenizer, out=out, **build)
    assert Manifest.read(out).tokens == json.loads(whole["set/manifest.json"])["tokens"]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_bytes_for_any_number_of_workers(
    start: Start, whole: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    process = start(tmp_path / "set", workers=workers, chunk=11)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert files_of(tmp_path / "set") == whole


def test_workers_end_with_their_parent(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path / "set", workers=2)
    lines_until(process, 1)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)  # not communicate: an orphan would hold the pipe open
    until(lambda: not any(_runs(pid) for pid in children), "their end", 20)


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_killed_worker_is_told_and_the_build_can_go_on(start: Start, whole: dict[str, bytes], tmp_path: Path) -> None:
    process = start(tmp_path / "set", workers=2)
    lines_until(process, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    names = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    os.kill(int(next(pid for pid, name in names.items() if "spawn_main" in name)), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "worker processes has died" in err
    assert "run the same command again" in err
    process = start(tmp_path / "set")
    process.communicate(timeout=60)
    assert files_of(tmp_path / "set") == whole


def test_two_builds_into_one_folder_at_once(start: Start, whole: dict[str, bytes], tmp_path: Path) -> None:
    first = start(tmp_path / "set")
    lines_until(first, 1)
    first.send_signal(signal.SIGSTOP)
    second = start(tmp_path / "set")
    _, err = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"another build into this folder is at work (process {first.pid})" in err
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=60)
    assert files_of(tmp_path / "set") == whole


def test_a_full_disk_is_told_and_the_build_goes_on_when_there_is_room(
    start: Start, whole: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(tmp_path / "set", limit=200_000)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "is full" in err
    assert "run the same command again to go on" in err
    assert not (tmp_path / "set").exists()
    process = start(tmp_path / "set")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert files_of(tmp_path / "set") == whole


def test_an_unfinished_build_of_another_recipe_is_refused(
    start: Start, whole: dict[str, bytes], tmp_path: Path, corpus: Path
) -> None:
    process = start(tmp_path / "set")
    lines_until(process, 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for more, told in (
        ({"block_size": 32}, "block_size is 32 and was 16"),
        ({"holdout": 0.3}, "holdout is 0.3 and was 0.2"),
        ({"sources": [str(corpus / "text" / "1.txt")]}, "sources is ['1.txt'] and was ['text']"),
    ):
        _, err = (other := start(tmp_path / "set", **more)).communicate(timeout=60)
        assert other.returncode == 1
        assert told in err
        assert "delete that folder to start anew" in err
    os.utime(corpus / "text" / "0.jsonl", (1, 1))
    _, err = start(tmp_path / "set").communicate(timeout=60)
    assert files_of(tmp_path / "set") == whole, f"what had been read of it is unchanged: {err}"


def test_a_shard_that_lost_bytes_meanwhile_is_refused(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path / "set")
    lines_until(process, 12)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shard = tmp_path / ".set.building/train/shard-000000.tar"
    os.truncate(shard, 1000)
    _, err = start(tmp_path / "set").communicate(timeout=60)
    assert "shard-000000.tar: expected" in err
    assert "delete" in err
