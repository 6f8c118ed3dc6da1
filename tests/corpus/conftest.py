"""Fixtures: the tokenizer, a corpus in a file, small chunks and frequent checkpoints; and what sets hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import make_tokenizer


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
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds hand out chunks of 50 documents, and make a checkpoint after each."""
    monkeypatch.setattr("revpatch.corpus.build.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("revpatch.corpus.chunks.CHUNK_DOCUMENTS", 50)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of more than 1,000 characters is long, and is encoded in pieces of 400."""
    monkeypatch.setattr("revpatch.corpus.chunks.LONG_CHARACTERS", 1000)
    monkeypatch.setattr("revpatch.corpus.chunks.PIECE_CHARACTERS", 400)
