"""Fixtures: the tokenizer, a corpus in a file, a built set of shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import make_text, make_tokenizer

from revpatch.stream.build import build_shards


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
