"""Long texts, which the tokenizer gets in pieces, give what short ones give."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from toy import make_text

from revpatch.corpus import chunks
from revpatch.corpus.build import build_shards
from revpatch.corpus.chunks import works_of
from revpatch.corpus.encode import Encoder, EncoderRecipe
from revpatch.corpus.sources import read_documents

ROOT = Path(__file__).resolve().parents[2]
BYTE_LEVEL = ROOT / "shards/demo_base/tokenizer.json"
WORDS = ["it's", "x1", "—", "\n", "😀", "  ", "don't!", "été", "\t", "a,b", "漢字", "\u3000", " ", "(", "3.14", "Ω"]
TRAINING = [" ".join(random.Random(i).choices([*WORDS, *make_text(i).split()], k=60)) for i in range(40)]


def _trained(model: Any, trainer: Any, normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer


def _bpe(normalizer: Any = None, pre_tokenizer: Any = None, **options: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    return _trained(models.BPE(unk_token="<unk>", **options), trainer, normalizer, pre_tokenizer)


def _unigram(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    return _trained(models.Unigram(), trainer, normalizer, pre_tokenizer)


def _llama() -> Tokenizer:
    """As Llama 2's: spaces become marks, one more is put before the text, and nothing divides it."""
    tokenizer = _bpe(None, pre_tokenizers.Metaspace(prepend_scheme="never"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    return tokenizer


def _with_tokens(*tokens: AddedToken) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(BYTE_LEVEL))
    tokenizer.add_tokens(list(tokens))
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": lambda: Tokenizer.from_file(str(BYTE_LEVEL)),
    "byte-level BPE, prefix space": lambda: _bpe(None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "BPE, a mark put before the text": _llama,
    "BPE, Metaspace first": lambda: _bpe(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "BPE, Metaspace always": lambda: _bpe(None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "BPE, unknown characters fused": lambda: _bpe(None, pre_tokenizers.Metaspace(), fuse_unk=True),
    "BPE, text stripped": lambda: _bpe(normalizers.Strip(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "BPE over spaces": _bpe,
    "Unigram, Metaspace": lambda: _unigram(pre_tokenizers.Metaspace()),
    "Unigram, not divided": lambda: _unigram(
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False), normalizers.NFKC()
    ),
    "WordPiece, as BERT": lambda: _trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False),
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    ),
    "tokens over two words": lambda: _with_tokens(AddedToken("the patch"), AddedToken("it's", rstrip=True)),
    "dropped spaces": lambda: _bpe(normalizers.Replace(Regex(" "), ""), None),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_have_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CONTEXT_CHARACTERS", 60)
    tokenizer = TOKENIZERS[kind]()
    encoder = Encoder(EncoderRecipe(tokenizer.to_str(), False, (), 0, "uint32", 0.0))
    cut = 0
    for seed in range(12):
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
        ("漢" * 25, [25]),
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
