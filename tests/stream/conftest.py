"""Fixtures: the tokenizer, a corpus in a file, a built set of shards; one elsewhere, and a cache for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flaky_server import FlakyServer
from remote_set import BLOCKS
from toy import make_text, make_tokenizer
from toy_shards import write_blocks

from revpatch.corpus.build import build_shards
from revpatch.shards import remote
from revpatch.shards.cache import ShardCache


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., Path]:
    """Writes texts as JSONL and returns the path."""

    def write(texts: list[str], name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def built(corpus: Callable[..., Path], tokenizer: Any, tmp_path: Path) -> Path:
    """A set of several shards, the last one not full."""
    out = tmp_path / "built"
    source = corpus([make_text(i) for i in range(60)], "built.jsonl")
    manifest = build_shards([source], tokenizer, 16, out, blocks_per_shard=20)
    assert len(manifest.shards) > 3
    assert manifest.shards[-1].blocks < 20
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six shards of ten blocks, but for the last one."""
    write_blocks(tmp_path / "set", BLOCKS, blocks_per_shard=10)
    return tmp_path / "set"


@pytest.fixture
def server(folder: Path) -> Iterator[FlakyServer]:
    """The folder over http."""
    flaky = FlakyServer(folder)
    yield flaky
    flaky.close()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ShardCache]:
    with ShardCache(tmp_path / "cache", 10**6) as opened:
        yield opened


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the attempts of a fetch, of which there are four."""
    monkeypatch.setattr(remote, "RETRIES", 3)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
