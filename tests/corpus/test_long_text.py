"""Long texts, which the tokenizer gets in pieces, give what short ones give."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from built import files_of
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from toy import make_text

from revpatch.corpus import chunks
from revpatch.corpus.build import build_shards
from revpatch.corpus.chunks import works_of
from revpatch.corpus.encode import Encoder, EncoderRecipe

BYTE_LEVEL = Path(__file__).resolve().parents[2] / "shards/demo_base/tokenizer.json"
WORDS = ["it's", "x1", "—", "\n", "😀", "  ", "don't!", "été", "\t", "a,b", "漢字", "\u3000", " ", "(", "3.14", "Ω"]
TRAINING = [" ".join(random.Random(i).choices([*WORDS, *make_text(i).split()], k=60)) for i in range(40)]
OPTIONS: dict[str, Any] = {"special_tokens": ["<unk>"], "show_progress": False}


def trained(model: Any, trainer: Any, normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer


def bpe(normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=400, **OPTIONS)
    return trained(models.BPE(unk_token="<unk>"), trainer, normalizer, pre_tokenizer)


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", **OPTIONS)
    pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return trained(models.Unigram(), trainer, normalizers.NFKC(), pre_tokenizer)


def llama() -> Tokenizer:
    """As Llama 2's: spaces become marks, one more is put before the text, and nothing divides it."""
    tokenizer = bpe(None, pre_tokenizers.Metaspace(prepend_scheme="never"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    return tokenizer


def with_tokens(*tokens: AddedToken) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(BYTE_LEVEL))
    tokenizer.add_tokens(list(tokens))
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": lambda: Tokenizer.from_file(str(BYTE_LEVEL)),
    "a mark put before the text": llama,
    "Unigram, not divided": unigram,
    "tokens over two words": lambda: with_tokens(AddedToken("the patch"), AddedToken("it's", rstrip=True)),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_have_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CONTEXT_CHARACTERS", 60)
    encoder = Encoder(EncoderRecipe(TOKENIZERS[kind]().to_str(), False, (), 0, "uint32", 0.0))
    cut = 0
    for seed in range(8):
        generator = random.Random(seed)
        text = " ".join(generator.choice([*WORDS, *make_text(seed).split()]) for _ in range(400))
        monkeypatch.setattr(chunks, "PIECE_CHARACTERS", 100 + 20 * seed)
        works = [work for work, _ in works_of(text, 0, encoder.ids)]
        assert "".join(piece for work in works for piece in work.texts) == text
        assert [i for work in works for i in encoder.encode(work).ids] == encoder.ids(text), seed
        cut += len(works) - 1
        if kind == "byte-level BPE":
            assert max(len(work.texts[0]) for work in works) <= 100 + 20 * seed
    assert cut > 5, "these texts can be cut"


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("漢" * 25 + "\n" + "字" * 5, [26, 5]),
        ("one two three", [7, 6]),
        ("x" * 9 + " " + "y" * 30 + " z", [9, 31, 2]),
    ],
)
def test_a_text_is_cut_between_words_or_lines_or_not_at_all(
    text: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "PIECE_CHARACTERS", 10)
    ids = Encoder(EncoderRecipe(Tokenizer.from_file(str(BYTE_LEVEL)).to_str(), False, (), 0, "uint32", 0.0)).ids
    assert [len(work.texts[0]) for work, _ in works_of(text, 0, ids)] == lengths


def test_long_documents_give_the_same_shards_as_short_ones(
    tmp_path: Path, tokenizer: Any, corpus: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    """The limits say how a text is read, not what becomes of it: not its tokens, nor its side of the holdout."""

    def texts(seed: int) -> list[str]:
        return [" ".join(make_text(seed + i + j) for j in range(i % 9)) for i in range(80)]

    text = tmp_path / "one.txt"
    text.write_text("\ufeff" + " ".join(make_text(i) for i in range(60)), encoding="utf-8")
    sources = [corpus([*texts(0), "é😀\n" * 400]), text, corpus(texts(500), "more.jsonl")]
    arguments: dict[str, Any] = {"holdout": 0.3, "max_tokens": 9000, "blocks_per_shard": 50}
    build_shards(sources, tokenizer, 8, tmp_path / "short", **arguments)
    request.getfixturevalue("short_pieces")
    build_shards(sources, tokenizer, 8, tmp_path / "long", **arguments)
    assert files_of(tmp_path / "short") == files_of(tmp_path / "long")
