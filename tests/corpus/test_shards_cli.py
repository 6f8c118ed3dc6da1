"""`revpatch shards`: build, verify, show, and what people see of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import Call, one_line
from toy import Toy, make_text

from revpatch.corpus.progress import BuildProgress, BuildSpeed
from revpatch.shards.format import Manifest

ROOT = Path(__file__).resolve().parents[2]


def test_a_set_is_built_verified_and_shown_and_what_is_bad_is_left_out(
    toy: Toy, tmp_path: Path, revpatch: Call
) -> None:
    source, out = tmp_path / "a corpus #1 😀.jsonl", tmp_path / "set"
    good = [json.dumps({"body": make_text(i)}) for i in range(200)]
    source.write_text("\n".join([*good[:20], "no json", '{"body": 3}', *good[20:]]), encoding="utf-8")
    command = ("shards", "build", source, "--tokenizer", toy.base, "--text-column", "body", "--block-size", 64)
    options = ("--out", out, "--workers", 1, "--holdout", 0.1, "--licence", "mine", "--max-tokens", 5000)
    one_line(revpatch(*command, *options), f"{source}:21", "--on-bad skip")
    built = revpatch(*command, *options, "--on-bad", "skip")
    assert built.code == 0, built
    assert re.search(r"set: \d+ blocks of 64 tokens from \d+ documents in 1 shards", built.out)
    manifest = Manifest.read(out)
    assert (manifest.licence, manifest.text_column, manifest.tokens) == ("mine", "body", 5000)
    verified = revpatch("shards", "verify", out)
    assert verified.code == 0 and "all 1 shards are what the manifest says" in " ".join(verified.out.split())
    shown = revpatch("shards", "show", out, "--tokenizer", toy.base, "--blocks", 2)
    assert shown.code == 0 and shown.out.count("--- block") == 2 and "learns" in shown.out
    assert f"sources      {source.name}" in shown.out
    for said in (built.out, shown.out):
        assert "2 documents could not be read and were left out:" in said
        assert f"  {source.name}:21: expected one JSON object" in said
    other = revpatch("shards", "show", out, "--tokenizer", ROOT / "shards/demo_base")
    assert other.code == 2 and "name the right one with --tokenizer" in " ".join(other.err.split())
    source.write_text("\n".join(make_text(i) for i in range(99)))
    lone = revpatch(
        *("shards", "build", source.rename(tmp_path / "a.txt"), "--tokenizer", toy.base, "--block-size", 16),
        *("--out", tmp_path / "lone", "--holdout", 0.2, "--workers", 1),
    )
    assert "the text is one document: the last 0.2 of it is in" in " ".join(lone.out.split()), lone
    assert "end of the only document" in revpatch("shards", "show", tmp_path / "lone_probe", "--blocks", 0).out


def test_a_broken_shard_is_named_with_exit_code_1(toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in toy.shards("first").iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    path = copied / Manifest.read(copied).shards[0].name
    path.write_bytes(path.read_bytes()[:-600])
    verified = revpatch("shards", "verify", copied)
    assert verified.code == 1
    assert f"{path.name}: expected" in verified.out
    assert "1 of 1 shards are broken; copy these files again" in " ".join(verified.out.split())
    one_line(revpatch("shards", "verify", tmp_path), "no manifest")


def test_mistakes_in_building_are_told_in_words(toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "out"
    text.write_text("the patch learns", encoding="utf-8")
    for source, tokenizer, more, words in (
        (tmp_path / "none.txt", toy.base, (), (tmp_path / "none.txt", "no such file")),
        (text, tmp_path / "none", (), ("--tokenizer", tmp_path / "none")),
        (text, toy.base, ("--out", text / "out"), (f"--out {text}", "is a file: name another place")),
        (text, toy.base, ("--block-size", 4096), ("not one block of 4096", "lower block_size")),
    ):
        one_line(revpatch("shards", "build", source, "--tokenizer", tokenizer, "--out", out, *more), *words)
    assert not out.exists()


def test_ctrl_c_says_how_to_resume(toy: Toy, tmp_path: Path) -> None:
    fifo = tmp_path / "endless.txt"
    os.mkfifo(fifo)
    command = ["build", str(fifo), "--tokenizer", str(toy.base), "--out", str(tmp_path / "out"), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "revpatch", "shards", *command],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    with fifo.open("wb"):  # opens when the build is reading
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to resume" in said


@pytest.mark.parametrize(("in_all", "limit", "left"), [(11, None, "0:00:10"), (11, 190_000, "0:00:04")])
def test_progress_says_how_fast_and_how_long(
    monkeypatch: pytest.MonkeyPatch, in_all: int, limit: int | None, left: str
) -> None:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    speed, size = BuildSpeed(), in_all * 2**20
    speed.describe(BuildProgress(5, 50_000, 1, 2**20, size, limit))  # of an earlier call: it doesn't count
    line = speed.describe(BuildProgress(9, 150_000, 3, 6 * 2**20, size, limit))
    assert line == f"9 documents, 150,000 tokens, 10,000 tokens/s, 6 of 11 MiB, {left} left"
