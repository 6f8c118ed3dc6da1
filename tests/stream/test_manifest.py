"""The manifest: what is written is read, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy import make_tokenizer
from toy_shards import make_manifest
from transformers import AutoTokenizer

from revpatch.corpus.tokenizer import tokenizer_fingerprint, tokenizer_info
from revpatch.shards.format import Manifest, TokenizerInfo


def test_what_is_written_is_read(tmp_path: Path) -> None:
    manifest = replace(make_manifest([3, 4]), licence="public domain", note="é", max_tokens=30, holdout=0.5)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_the_digest_is_of_the_content_not_of_the_layout(tmp_path: Path) -> None:
    manifest = make_manifest([3, 4])
    manifest.write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert Manifest.read(tmp_path).digest == manifest.digest
    assert replace(manifest, note="other").digest != manifest.digest
    assert len(manifest.digest) == 64


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.update(values)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (change(version=2), "version: expected 1, found 2"),
        (change(surprise=1), "surprise: expected no such key, found 1"),
        (lambda m: m.pop("blocks"), "blocks: expected a value, found 'nothing'"),
        (change(block_size="4"), "block_size: expected a whole number, 0 or more, found '4'"),
        (change(documents=True), "documents: expected a whole number"),
        (change(documents=-1), "documents: expected a whole number"),
        (change(dtype="int32"), "dtype: expected 'uint16' or 'uint32', found 'int32'"),
        (change(blocks=8), "blocks: expected 7"),
        (change(tokens=27), "tokens: expected 28"),
        (change(sources="a.txt"), "sources: expected a list"),
        (change(sources=[1]), "sources[0]: expected text, found 1"),
        (change(licence=3), "licence: expected text, found 3"),
        (change(holdout="none"), "holdout: expected a number"),
        (lambda m: m["shards"][1].update(name="../evil.tar"), "shards[1].name"),
        (lambda m: m["shards"][1].update(name=m["shards"][0]["name"]), "shards: expected names that differ"),
        (lambda m: m["shards"][1].update(sha256="xyz"), "shards[1].sha256"),
        (lambda m: m["shards"][1].pop("bytes"), "shards[1].bytes: expected a value"),
        (lambda m: m["tokenizer"].update(vocab_size=None), "tokenizer.vocab_size: expected a whole number"),
        (change(tokenizer=None), "tokenizer: expected an object"),
    ],
)
def test_a_manifest_that_is_not_sound_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], told: str
) -> None:
    make_manifest([3, 4]).write(tmp_path)
    path = tmp_path / "manifest.json"
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"manifest\.json: ") as error:
        Manifest.read(tmp_path)
    assert told in str(error.value)


def test_no_manifest_and_half_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no manifest"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 1,')
    with pytest.raises(ValueError, match="not valid JSON"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object"):
        Manifest.read(tmp_path)


def test_the_fingerprint_is_of_the_vocabulary_not_of_path_or_state(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path / "here")
    tokenizer.save_pretrained(tmp_path / "there")
    for place in ("here", "there"):
        assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / place)) == fingerprint
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["some words", "x"], truncation=True, max_length=2, padding=True)
    assert tokenizer_fingerprint(tokenizer) == fingerprint
    assert tokenizer_fingerprint(make_tokenizer(290)) != fingerprint
    tokenizer.add_tokens(["patchwork"])
    assert tokenizer_fingerprint(tokenizer) != fingerprint


def test_the_fingerprint_sees_the_order_of_merges_and_the_normaliser() -> None:
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"].reverse()
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|endoftext|>")
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    other = make_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_tokenizer_info(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tiny")
    info = tokenizer_info(AutoTokenizer.from_pretrained(tmp_path / "tiny"))
    assert info == TokenizerInfo("tiny", tokenizer_fingerprint(tokenizer), 300, 0)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        tokenizer_info(tokenizer)
    with pytest.raises(ValueError, match="not a fast tokenizer"):
        tokenizer_info(object())


def test_a_folder_without_a_tokenizer_is_not_taken_for_one(tmp_path: Path) -> None:
    """transformers makes an empty tokenizer of a model's folder that has none; it would turn any text into nothing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    empty = AutoTokenizer.from_pretrained(tmp_path)
    for describe in (tokenizer_fingerprint, tokenizer_info):
        with pytest.raises(ValueError, match="no token but"):
            describe(empty)
