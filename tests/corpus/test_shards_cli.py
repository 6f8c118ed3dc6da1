"""`revpatch shards`, from the shell: build, verify, show, and what people see of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import Call, Result, one_line
from toy import BLOCK_SIZE, Toy, make_text

from revpatch.corpus.progress import BuildProgress, BuildSpeed
from revpatch.shards.format import Manifest

ROOT = Path(__file__).resolve().parents[2]
WIDE = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}


def shards(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "revpatch", "shards", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=WIDE, timeout=100)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a corpus #1 😀")
    for part in range(3):
        lines = (json.dumps({"body": make_text(part * 100 + i)}) + "\n" for i in range(100))
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_a_folder_is_built_by_several_workers_verified_and_shown(corpus: Path, toy: Toy, tmp_path: Path) -> None:
    options = ("--tokenizer", toy.base, "--text-column", "body", "--block-size", "512")
    out = tmp_path / "set"
    built = shards("build", corpus, *options, "--out", out, "--workers", "2", "--shard-mb", "1", "--holdout", "0.1")
    assert built.returncode == 0, built.stderr
    assert re.search(r"set: \d+ blocks of 512 tokens from \d+ documents in 1 shards", built.stdout)
    verified = shards("verify", out)
    assert (verified.returncode, verified.stderr) == (0, "")
    assert "all 1 shards are what the manifest says" in verified.stdout
    shown = shards("show", out, "--tokenizer", toy.base, "--blocks", "2")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("--- block") == 2
    assert f"sources      {corpus.name}" in shown.stdout
    assert "the patch" in shown.stdout or "forgets" in shown.stdout


def test_a_broken_shard_is_named_with_exit_code_1(toy: Toy, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in toy.shards("first").iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    path = copied / Manifest.read(copied).shards[0].name
    path.write_bytes(path.read_bytes()[:-600])
    verified = shards("verify", copied)
    assert verified.returncode == 1
    assert f"{path.name}: expected" in verified.stdout
    assert "1 of 1 shards are broken; copy these files again" in verified.stdout
    nothing = shards("verify", tmp_path)
    assert nothing.returncode == 2
    assert "no manifest" in nothing.stderr


def test_showing_with_the_wrong_tokenizer_is_refused(toy: Toy) -> None:
    other = ROOT / "shards/demo_base"
    shown = shards("show", toy.shards("first"), "--tokenizer", other)
    assert shown.returncode == 2
    assert "name the right one with --tokenizer" in shown.stderr
    assert f"blocks of {BLOCK_SIZE} tokens" in shown.stdout
    assert shards("show", toy.shards("first"), "--blocks", "0").returncode == 0


def test_ctrl_c_says_how_to_go_on(toy: Toy, tmp_path: Path) -> None:
    fifo = tmp_path / "endless.txt"
    os.mkfifo(fifo)
    command = ["build", str(fifo), "--tokenizer", str(toy.base), "--out", str(tmp_path / "out"), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "revpatch", "shards", *command],
        stdout=subprocess.PIPE,
        text=True,
        env=WIDE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    with fifo.open("wb"):  # opens when the build is reading
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to go on" in said


def test_progress_says_how_fast_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    speed = BuildSpeed()
    speed.describe(BuildProgress(5, 50_000, 1, 2**20, 11 * 2**20))  # of an earlier call: it doesn't count
    line = speed.describe(BuildProgress(9, 150_000, 3, 6 * 2**20, 11 * 2**20))
    assert line == "9 documents, 150,000 tokens, 10,000 tokens/s, 6 of 11 MiB, 0:00:10 left"


@pytest.mark.parametrize("in_all", [None, 11 * 2**20])
def test_progress_knows_that_a_build_ends_after_so_many_tokens(
    monkeypatch: pytest.MonkeyPatch, in_all: int | None
) -> None:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    speed = BuildSpeed()
    speed.describe(BuildProgress(5, 50_000, 1, 2**20, in_all, 190_000))
    assert speed.describe(BuildProgress(9, 150_000, 3, 6 * 2**20, in_all, 190_000)).endswith(", 0:00:04 left")


def test_shards_are_built_from_files(toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the patch learns what a stream brings\n\n" * 40, encoding="utf-8")
    lines = tmp_path / "b.jsonl"
    lines.write_text("".join(json.dumps({"body": f"it forgets little {i}"}) + "\n" for i in range(60)), "utf-8")
    out = tmp_path / "shards"
    arguments = ["shards", "build", text, "--tokenizer", toy.base, "--block-size", "8"]
    result = revpatch(*arguments, "--out", out, "--licence", "mine", "--note", "toy")
    assert result.code == 0, result
    manifest = Manifest.read(out)
    assert (manifest.block_size, manifest.licence, manifest.note) == (8, "mine", "toy")
    assert f"{manifest.blocks} blocks of 8 tokens from {manifest.documents} documents in 1 shards" in result.out
    both = tmp_path / "held"
    result = revpatch(
        *("shards", "build", lines, "--text-column", "body", "--tokenizer", toy.base, "--block-size", "4"),
        *("--out", both, "--holdout", "0.3", "--max-tokens", "64"),
    )
    assert result.code == 0, result
    assert Manifest.read(both).tokens == 64
    assert Manifest.read(tmp_path / "held_probe").split == "probe"


def test_mistakes_in_building_are_told_in_words(toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the patch learns", encoding="utf-8")
    out = tmp_path / "out"

    def build(source: Path, tokenizer: Path, *more: str) -> Result:
        return revpatch("shards", "build", source, "--tokenizer", tokenizer, "--out", out, *more)

    one_line(build(tmp_path / "none.txt", toy.base), tmp_path / "none.txt", "no such file")
    one_line(build(text, tmp_path / "none"), "--tokenizer", tmp_path / "none")
    one_line(build(text, toy.base, "--out", str(text / "out")), f"--out {text}", "is a file: name another place")
    one_line(build(text, toy.base, "--block-size", "4096"), "not one block of 4096", "lower block_size")
    mute = tmp_path / "mute"
    mute.mkdir()
    (mute / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    one_line(build(text, mute), "tokenizer", mute, "tokenizer.json")
    assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("x", encoding="utf-8")
    one_line(build(text, toy.base, "--block-size", "2"), out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_what_is_bad_is_told_left_out_and_shown(toy: Toy, tmp_path: Path) -> None:
    """From the shell: it stops with what to do, is built without, and says what it has left out."""
    source, out = tmp_path / "mine.jsonl", tmp_path / "set"
    texts = [json.dumps({"text": make_text(i)}) for i in range(40)]
    source.write_text("\n".join([*texts[:20], "no json", '{"text": 3}', *texts[20:]]))
    command = ("build", source, "--tokenizer", toy.base, "--block-size", "16", "--out", out, "--workers", "1")
    stopped = shards(*command)
    assert (stopped.returncode, stopped.stdout) == (2, "")
    assert re.search(r"mine\.jsonl:21: .*--on-bad skip", " ".join(stopped.stderr.split()))
    built = shards(*command, "--on-bad", "skip")
    assert built.returncode == 0, built.stderr
    shown = shards("show", out, "--blocks", "0")
    for said in (built.stdout, shown.stdout):
        assert "2 documents could not be read and were left out:" in said
        assert re.search(r"\n  mine\.jsonl:21: expected one JSON object.*\n  mine\.jsonl:22: ", said)
    source.write_text("\n".join(make_text(i) for i in range(99)))
    lone = source.rename(tmp_path / "input.txt")
    built = shards("build", lone, *command[2:-3], tmp_path / "lone", "--holdout", "0.2")
    assert built.returncode == 0, built.stderr
    assert "the text is one document: the last 0.2 of it is in" in " ".join(built.stdout.split())
    assert "0.2, the end of the only document" in shards("show", tmp_path / "lone_probe", "--blocks", "0").stdout
