"""The lock of an unfinished build is held while it is open, and let go however it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from revpatch.stream import build
from revpatch.stream.unfinished import UnfinishedBuild

RECIPE: dict[str, Any] = {"block_size": 16}
INPUTS = [{"name": "a.txt"}]
CHECKPOINT = {"position": {"input": 0}}


def opened(folder: Path, **recipe: Any) -> UnfinishedBuild:
    return UnfinishedBuild(folder / "set", {**RECIPE, **recipe}, INPUTS)


@pytest.mark.parametrize("keep", [True, False])
def test_a_build_that_is_closed_lets_the_next_one_in(tmp_path: Path, keep: bool) -> None:
    first = opened(tmp_path)
    first.save(CHECKPOINT)
    with pytest.raises(BlockingIOError, match="another build into this folder is at work"):
        opened(tmp_path)
    first.close(keep=keep)
    second = opened(tmp_path)
    assert second.checkpoint == (CHECKPOINT if keep else None)
    with pytest.raises(BlockingIOError):
        opened(tmp_path)
    second.close(keep=False)
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_is_refused_keeps_no_lock(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.save(CHECKPOINT)
    first.close(keep=True)
    with pytest.raises(FileExistsError, match="block_size is 32 and was 16"):
        opened(tmp_path, block_size=32)
    opened(tmp_path).close(keep=False)


def test_a_build_that_stops_at_a_bad_line_says_how_it_is_begun_anew(
    corpus: Callable[..., Path], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "CHECKPOINT_SECONDS", 0.0)
    path = corpus([f"text {i}" for i in range(1200)])
    good = path.read_bytes()
    path.write_bytes(good + b"no json\n")
    with pytest.raises(ValueError, match=r"corpus\.jsonl:1201: .*\.set\.building, .* delete that folder to build anew"):
        build.build_shards(path, tokenizer, 16, tmp_path / "set")
    path.write_bytes(good + json.dumps({"text": "mended"}).encode())
    with pytest.raises(FileExistsError, match=r"corpus\.jsonl has changed.*delete that folder"):
        build.build_shards(path, tokenizer, 16, tmp_path / "set")
    shutil.rmtree(tmp_path / ".set.building")
    assert build.build_shards(path, tokenizer, 16, tmp_path / "set").documents == 1201
