"""Long texts, which the tokenizer gets in pieces, give what short ones give."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from toy import make_text

from revpatch.stream import chunks
from revpatch.stream.build import build_shards
from revpatch.stream.chunks import pieces_of
from revpatch.stream.sources import read_documents

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = Tokenizer.from_file(str(ROOT / "shards/demo_base/tokenizer.json"))
WORDS = ["it's", "x1", "—", "\n", "😀", "  ", "don't!", "été", "\t", "a,b", "漢字", "\u3000", " ", "(", "3.14"]


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


@given(st.integers(0, 2**32), st.integers(100, 300))
@settings(max_examples=40, deadline=None)
def test_pieces_have_the_tokens_of_the_whole(seed: int, limit: int) -> None:
    generator = random.Random(seed)
    text = " ".join(generator.choice([*WORDS, *make_text(seed).split()]) for _ in range(400))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "PIECE_CHARACTERS", limit)
        pieces = pieces_of(text)
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert max(map(len, pieces)) <= limit
    assert [i for piece in pieces for i in ids(piece)] == ids(text)


def test_a_text_without_a_space_is_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "PIECE_CHARACTERS", 10)
    assert pieces_of("漢" * 25) == ["漢" * 10, "漢" * 10, "漢" * 5]


@pytest.fixture
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "LONG_CHARACTERS", 500)
    monkeypatch.setattr(chunks, "PIECE_CHARACTERS", 100)


def texts_for(seed: int) -> list[str]:
    """Short and long texts, mixed."""
    return [" ".join(make_text(seed + i + j) for j in range(i % 9)) for i in range(80)]


def test_long_documents_are_read_as_they_are(tmp_path: Path, low_limits: None) -> None:
    texts = [*texts_for(0), "é😀\n" * 400]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "id": f"n{i}"}) for i, t in enumerate(texts)))
    (tmp_path / "b.txt").write_text("\ufeff" + texts[-1], encoding="utf-8")
    documents = list(read_documents([tmp_path / "a.jsonl", tmp_path / "b.txt"]))
    assert [d.text for d in documents] == [*texts, texts[-1]]
    assert [d.id for d in documents] == [*(f"n{i}" for i in range(len(texts))), "b.txt"]


def test_long_documents_give_the_same_shards_as_short_ones(
    tmp_path: Path, tokenizer: Any, corpus: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    """The limits say how a text is read, not what becomes of it: not its tokens, nor its side of the holdout."""
    text = tmp_path / "one.txt"
    text.write_text(" ".join(make_text(i) for i in range(60)), encoding="utf-8")
    sources = [corpus(texts_for(0)), text, corpus(texts_for(500), "more.jsonl")]
    arguments: dict[str, Any] = {"holdout": 0.3, "max_tokens": 9000, "blocks_per_shard": 50}
    build_shards(sources, tokenizer, 8, tmp_path / "short", **arguments)
    request.getfixturevalue("low_limits")
    build_shards(sources, tokenizer, 8, tmp_path / "long", **arguments)
    for side in ("", "_probe"):
        files = [{p.name: p.read_bytes() for p in (tmp_path / f"{n}{side}").iterdir()} for n in ("short", "long")]
        assert files[0] == files[1]
