"""Builds that end early: killed, stopped, two at once, out of room, with mended sources, with any number of workers."""

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
from built import files_of, lines
from toy import make_text
from waiting import until

from revpatch.corpus import build
from revpatch.corpus.progress import BuildProgress
from revpatch.shards.format import Manifest

ROOT = Path(__file__).resolve().parents[2]
BUILD = """
import json, sys
sys.modules["torch"] = None  # takes seconds, and webdataset does without it
import revpatch.corpus.build, revpatch.corpus.chunks
from tokenizers import Tokenizer

class LightTokenizer:  # importing transformers takes seconds
    name_or_path, eos_token_id, all_special_tokens = "light", 0, ("<|endoftext|>",)

    def __init__(self, path):
        self.backend_tokenizer = Tokenizer.from_file(path)
        self.get_vocab = self.backend_tokenizer.get_vocab

    def __len__(self):
        return len(self.get_vocab())

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
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Several files, among them long texts of both kinds and lines that can't be read, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "script.py").write_text(BUILD)
    (folder / "text").mkdir()
    for part in range(2):
        some = [json.dumps({"text": make_text(part * 1000 + i)}) + "\n" for i in range(240)]
        some[100] = "no json\n"
        some[200] = json.dumps({"text": " ".join(make_text(i) for i in range(400)), "n": part}) + "\n"
        (folder / f"text/{part}.jsonl").write_text("".join(some), encoding="utf-8")
        (folder / f"text/{part}.txt").write_text(" ".join(make_text(i) for i in range(part, 500)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def start(folder: Path) -> Start:
    """start(out, **arguments): a build of the corpus in a process of its own; it prints a line for each chunk."""

    def run(out: Path, limit: int | None = None, **more: Any) -> subprocess.Popen[str]:
        arguments = {
            "sources": [str(folder / "text")],
            "tokenizer": str(folder / "tokenizer.json"),
            "block_size": 16,
            "out": str(out),
            "holdout": 0.2,
            "blocks_per_shard": 150,
            "on_bad": "skip",
            **more,
        }
        return subprocess.Popen(
            [sys.executable, str(folder / "script.py"), json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
        )

    return run


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    said, err = process.communicate(timeout=100)
    return process.returncode, said, err


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted build."""
    out = tmp_path_factory.mktemp("whole") / "set"
    code, _, err = end_of(start(out))
    assert code == 0, err
    assert len(Manifest.read(out).shards) > 3
    assert [bad.partition(" ")[0] for bad in Manifest.read(out).bad] == [f"{part}.jsonl:101:" for part in range(2)]
    return files_of(out)


def killed_after(process: subprocess.Popen[str], chunks: int) -> int:
    """Kill a build after so many chunks; return its tokens by then."""
    assert process.stdout is not None
    tokens = [process.stdout.readline() for _ in range(chunks)][-1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return int(tokens)


def test_a_killed_build_is_resumed_by_any_number_of_workers_and_ends_with_the_same_bytes(
    start: Start, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    before = 0
    for chunks, workers in ((1, 1), (7, 2), (16, 1)):
        tokens = killed_after(start(out, workers=workers), chunks)
        assert not out.exists(), "the name is there only when the set is whole"
        assert tokens > before, "it was resumed instead of begun anew"
        before = tokens
    code, said, err = end_of(start(out, workers=3, chunk=7))
    assert code == 0, err
    assert int(said.split()[0]) > before // 2
    assert files_of(out) == whole
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_workers_end_with_their_parent_and_a_killed_worker_is_reported(
    start: Start, whole: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(tmp_path / "set", workers=2)
    assert process.stdout is not None and process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[0], signal.SIGKILL)
    code, _, err = end_of(process)
    assert code == 1
    assert "worker processes has died" in err and "run the same command again" in err
    process = start(tmp_path / "set", workers=2)
    assert process.stdout is not None and process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)  # not communicate: an orphan would hold the pipe open
    until(lambda: not any(_runs(int(pid)) for pid in children), "their end", 20)
    assert end_of(start(tmp_path / "set"))[0] == 0
    assert files_of(tmp_path / "set") == whole


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_two_builds_into_one_folder_at_once_and_a_full_disk(
    start: Start, whole: dict[str, bytes], tmp_path: Path
) -> None:
    code, _, err = end_of(start(tmp_path / "set", limit=100_000))
    assert code == 1 and "is full" in err and "run the same command again to resume" in err
    assert not (tmp_path / "set").exists()
    first = start(tmp_path / "set")
    assert first.stdout is not None and first.stdout.readline()
    first.send_signal(signal.SIGSTOP)
    code, _, err = end_of(start(tmp_path / "set"))
    assert code == 1 and "another build into this folder is at work" in err
    first.send_signal(signal.SIGCONT)
    assert end_of(first)[0] == 0
    assert files_of(tmp_path / "set") == whole


def test_a_kill_while_it_is_installed_is_made_good(
    folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames, as a signal can't be timed to fall there."""
    out = tmp_path / "set"
    options: dict[str, Any] = {"out": out, "block_size": 16, "holdout": 0.2, "blocks_per_shard": 300}
    real, calls = build.install_folder, []

    def once(*arguments: Any) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(build, "install_folder", once)
        with pytest.raises(KeyboardInterrupt):
            build.build_shards(folder / "text/0.txt", tokenizer, **options)
    assert not out.exists() and (tmp_path / "set_probe").exists()
    with monkeypatch.context() as patch:
        patch.setattr(build, "encode_in_order", lambda *_: pytest.fail("nothing is left to encode"))
        (tmp_path / "set_probe").rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError, match=r"set_probe: .* now it is gone: put it back, or delete .*building"):
            build.build_shards(folder / "text/0.txt", tokenizer, **options)
        assert not out.exists(), "a set without its probe would look whole"
        (tmp_path / "away").rename(tmp_path / "set_probe")
        assert build.build_shards(folder / "text/0.txt", tokenizer, **options) == Manifest.read(out)


# Sources that are mended.


def texts(count: int, first: int = 0) -> list[bytes]:
    return lines(*({"text": f"text {i} of words"} for i in range(first, first + count))).splitlines(keepends=True)


GOOD, MENDED = texts(600), [b'{"text": "mended"}\n']
EDITS: dict[str, tuple[dict[str, list[bytes] | None], str]] = {  # what becomes of which file
    "the bad line is mended": ({"b": [*GOOD, *MENDED]}, ""),
    "a later file is gone": ({"b": GOOD, "c": None}, ""),
    "a line that was read is another": (
        {"b": [*MENDED, *GOOD[1:], *MENDED]},
        r"b\.jsonl: the first \d+ documents of it, which had been read .*, are not what they were; put back .*delete",
    ),
    "a file that was read is another": ({"a": GOOD}, r"a\.jsonl has changed after it had been read"),
    "a file that was read is gone": ({"a": None}, r"file 1 is .*b\.jsonl and was .*a\.jsonl, which had been read"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.usefixtures("small_chunks")
def test_a_source_may_be_mended_behind_what_was_read_of_it(edit: str, tokenizer: Any, tmp_path: Path) -> None:
    changes, told = EDITS[edit]
    (tmp_path / "text").mkdir()
    for name, body in {"a": texts(70, 700), "b": [*GOOD, b"no json\n"], "c": texts(5, 800)}.items():
        (tmp_path / f"text/{name}.jsonl").write_bytes(b"".join(body))
    arguments = (tmp_path / "text", tokenizer, 16)
    with pytest.raises(ValueError, match=r"b\.jsonl:601: .*--on-bad skip.* is kept in .*\.set\.building: mend what is"):
        build.build_shards(*arguments, tmp_path / "set", holdout=0.2)
    for name, changed in changes.items():
        path = tmp_path / f"text/{name}.jsonl"
        path.unlink() if changed is None else path.write_bytes(b"".join(changed))
    for _ in range(2 if told else 0):  # and a second time, as nothing is forgotten of what was read
        with pytest.raises((ValueError, FileExistsError), match=told):
            build.build_shards(*arguments, tmp_path / "set", holdout=0.2)
    if not told:
        seen: list[BuildProgress] = []
        build.build_shards(*arguments, tmp_path / "set", holdout=0.2, progress=seen.append)
        assert seen[0].documents > 600, "it was resumed"
        build.build_shards(*arguments, tmp_path / "fresh", holdout=0.2)
        assert files_of(tmp_path / "set") == files_of(tmp_path / "fresh")


@pytest.mark.usefixtures("small_chunks")
def test_a_stopped_build_is_resumed_without_what_is_bad_but_not_the_other_way_round(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join([*GOOD, b"no json\n", *texts(200, 700)]))

    def build_it(name: str, **options: Any) -> Manifest:
        return build.build_shards(path, tokenizer, 16, tmp_path / name, **options)

    def killed(progress: BuildProgress) -> None:
        if progress.documents > 700:
            raise KeyboardInterrupt

    with pytest.raises(ValueError, match=r"a\.jsonl:601"):
        build_it("set")
    with pytest.raises(KeyboardInterrupt):
        build_it("set", on_bad="skip", progress=killed)
    shard = tmp_path / ".set.building/all/shard-000000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:1000])
    with pytest.raises(ValueError, match=r"shard-000000\.tar: expected .* found 1000; .* delete"):
        build_it("set", on_bad="skip")
    shard.write_bytes(data)
    with pytest.raises(FileExistsError, match=r"block_size is 32 and was 16.* delete that folder to start anew"):
        build.build_shards(path, tokenizer, 32, tmp_path / "set", on_bad="skip")
    with pytest.raises(ValueError, match=r"left out 1 documents, the first being a\.jsonl:601: .* --on-bad skip"):
        build_it("set")
    manifest = build_it("set", on_bad="skip")
    assert manifest == build_it("fresh", on_bad="skip")
    assert (manifest.documents, manifest.bad_documents) == (800, 1)


@pytest.mark.usefixtures("small_chunks")
def test_a_file_that_is_written_to_while_it_is_read_is_refused(
    corpus: Callable[..., Path], tokenizer: Any, tmp_path: Path
) -> None:
    path = corpus([f"text {i} of words" for i in range(190)])

    def grow(_: BuildProgress) -> None:
        with path.open("a") as file:
            file.write('{"text": "one more"}\n')

    with pytest.raises(ValueError, match=r"corpus\.jsonl: changed while it was read; let what writes to it"):
        build.build_shards(path, tokenizer, 16, tmp_path / "set", progress=grow)
    resumed = build.build_shards(path, tokenizer, 16, tmp_path / "set")
    assert resumed.documents == len(path.read_text().splitlines())
