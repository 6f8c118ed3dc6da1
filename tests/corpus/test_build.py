"""Documents to shards: what the blocks hold, that they are the same every time, and what never leaks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from built import files_of, texts_of, tokens_of
from tokenizers import Tokenizer, models, pre_tokenizers
from toy import make_text, make_tokenizer
from transformers import PreTrainedTokenizerFast

from revpatch.corpus.build import build_shards
from revpatch.corpus.encode import is_held_out
from revpatch.shards.format import Manifest

Corpus = Callable[..., Path]


def test_blocks_are_the_documents_each_ended_by_eos(corpus: Corpus, tokenizer: Any, tmp_path: Path) -> None:
    texts = ["first", "", "second, with 😀 and \x1b", "third " * 50]
    manifest = build_shards([corpus(texts)], tokenizer, 8, tmp_path / "out", licence="mine", note="why")
    expected: list[int] = []
    for text in texts:
        if text:
            expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    whole = len(expected) // 8 * 8
    assert tokens_of(tmp_path / "out") == expected[:whole]
    assert (manifest.documents, manifest.empty_documents) == (3, 1)
    assert (manifest.tokens, manifest.dropped_tokens) == (len(expected), len(expected) - whole)
    assert (manifest.licence, manifest.note, manifest.sources) == ("mine", "why", ("corpus.jsonl",))
    assert Manifest.read(tmp_path / "out") == manifest


def test_a_large_vocabulary_takes_four_bytes(corpus: Corpus, tmp_path: Path) -> None:
    vocabulary = {f"w{i}": i for i in range(2**16 + 9)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0")
    manifest = build_shards([corpus(["w65540 w7 w65300"] * 4)], fast, 4, tmp_path / "out")
    assert manifest.dtype == "uint32"
    assert tokens_of(tmp_path / "out") == [65540, 7, 65300, 0] * 4


def test_chunks_and_the_clock_change_no_byte(corpus: Corpus, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    source = corpus([make_text(i) if i % 3 else "" for i in range(300)])
    options: dict[str, Any] = {"holdout": 0.3, "blocks_per_shard": 10}
    for more in ({}, {"max_tokens": 1003}):
        monkeypatch.setattr("revpatch.corpus.chunks.CHUNK_DOCUMENTS", 512)
        build_shards([source], tokenizer, 16, tmp_path / f"one{len(more)}", **options, **more)
        monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
        monkeypatch.setattr("revpatch.corpus.chunks.CHUNK_DOCUMENTS", 7)
        build_shards([source], make_tokenizer(), 16, tmp_path / f"deep/two{len(more)}", **options, **more)
        assert files_of(tmp_path / f"one{len(more)}") == files_of(tmp_path / f"deep/two{len(more)}")


def test_the_same_build_again_is_left_alone_and_another_is_refused(
    corpus: Corpus, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    texts = [make_text(i) for i in range(30)]
    out.mkdir()  # an empty folder is as good as none
    first = build_shards([corpus(texts)], tokenizer, 8, out)
    before = {path: path.stat().st_ino for path in out.iterdir()}
    with caplog.at_level("INFO", logger="revpatch"):
        assert build_shards([corpus(texts)], tokenizer, 8, out) == first
    assert "already" in caplog.text
    with pytest.raises(FileExistsError, match=r"differs in.* tokens"):
        build_shards([corpus([*texts, "more"])], tokenizer, 8, out)
    assert {path: path.stat().st_ino for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.building", "corpus.jsonl", "out"]
    out.rename(tmp_path / "away")
    with monkeypatch.context() as patch:  # the work was kept
        patch.setattr("revpatch.corpus.build.encode_in_order", lambda *_: pytest.fail("nothing is left to encode"))
        assert build_shards([tmp_path / "corpus.jsonl"], tokenizer, 8, out).tokens > first.tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "corpus.jsonl", "out"]


def test_places_that_are_no_new_folder_are_refused_before_any_work(
    corpus: Corpus, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    source = corpus([make_text(i) for i in range(50)], "text/a.jsonl")
    build_shards(corpus([make_text(i) for i in range(9)], "o.jsonl"), tokenizer, 8, tmp_path / "set_probe")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.tex").write_text("x")
    monkeypatch.setattr("revpatch.corpus.build._fill", lambda *_: pytest.fail("it began"))
    for out, told in (
        ("taken", "no set of shards"),
        ("taken/thesis.tex", "found a file"),
        ("set", "set_probe: holds another set"),
        ("text", "expected a new or empty folder"),
        ("text/deep", "lies in"),
    ):
        with pytest.raises((ValueError, FileExistsError), match=told):
            build_shards(source.parent, tokenizer, 8, tmp_path / out, holdout=0.3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "set_probe", "taken", "text"]


@pytest.mark.parametrize(
    ("texts", "arguments", "told"),
    [
        ([], {}, r"not one block of 64 tokens: 0 documents"),
        (["", ""], {}, r"0 documents \(2 more were empty\)"),
        (["few"], {}, r"not one block of 64 tokens: 1 documents"),
        (["long " * 200], {"holdout": 1e-6}, "on the probe side of holdout 1e-06"),
        (["long " * 200] * 2, {"holdout": 1e-6, "max_tokens": 64}, "full with max_tokens 64 after 1 documents"),
        (["x"], {"block_size": 1}, "block_size is 1"),
        (["x"], {"holdout": 1.0}, "holdout is 1.0"),
        (["x"], {"max_tokens": 7}, "max_tokens is 7"),
        (["x"], {"blocks_per_shard": 0}, "blocks_per_shard is 0"),
        (["x"], {"sources": []}, "no source at all"),
    ],
)
def test_too_little_text_and_impossible_numbers_leave_nothing(
    corpus: Corpus, tokenizer: Any, tmp_path: Path, texts: list[str], arguments: Any, told: str
) -> None:
    defaults = {"sources": [corpus(texts)], "tokenizer": tokenizer, "block_size": 64, "out": tmp_path / "out"}
    with pytest.raises(ValueError, match=told):
        build_shards(**{**defaults, **arguments})
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_max_tokens_cuts_the_training_side_exactly(
    corpus: Corpus, tokenizer: Any, tmp_path: Path, holdout: float
) -> None:
    source = corpus([make_text(i) for i in range(200)])
    build_shards([source], tokenizer, 8, tmp_path / "all", holdout=holdout)
    manifest = build_shards([source], tokenizer, 8, tmp_path / "cut", holdout=holdout, max_tokens=1003)
    assert (manifest.tokens, manifest.blocks, manifest.dropped_tokens) == (1003, 125, 3)
    assert tokens_of(tmp_path / "cut") == tokens_of(tmp_path / "all")[:1000]
    assert manifest.documents < 200


def test_holdout_takes_whole_documents_never_leaks_and_never_moves(
    corpus: Corpus, tokenizer: Any, tmp_path: Path
) -> None:
    texts = [make_text(i) for i in range(300)]
    others = [make_text(i) for i in range(500, 700)]
    for name, documents in (("few", texts), ("many", others + texts[::-1] + texts[:100])):  # duplicates, as in life
        train = build_shards([corpus(documents)], tokenizer, 4, tmp_path / name, holdout=0.25)
        probe = Manifest.read(tmp_path / f"{name}_probe")
        assert (train.split, probe.split) == ("train", "probe")
        assert train.documents + probe.documents == len(documents)
    probes = [set(texts_of(tmp_path / f"{name}_probe", tokenizer)[:-1]) for name in ("few", "many")]
    trains = [set(texts_of(tmp_path / name, tokenizer)[:-1]) for name in ("few", "many")]
    assert all(len(side) > 30 for side in (*probes, *trains))
    assert probes[0] | trains[0] <= set(texts)
    assert not (probes[0] | probes[1]) & (trains[0] | trains[1])
    assert len(probes[0] - probes[1]) <= 1, "but for the last document, which may be cut"


def test_the_holdout_is_of_the_size_asked_for_and_grows_with_it() -> None:
    texts = [make_text(i) for i in range(4000)]
    small = {text for text in texts if is_held_out(text, 0.05)}
    large = {text for text in texts if is_held_out(text, 0.2)}
    assert small < large
    assert abs(len(small) / 4000 - 0.05) < 0.015
    assert abs(len(large) / 4000 - 0.2) < 0.025
    # Pinned: were the hash to change, every probe set in the world would start to leak.
    assert sum(is_held_out(f"pin {i}", 0.5) << i for i in range(32)) == 1414414940


BAD = ["no json", '{"text": 3}', '{"other": "x"}', '{"text": "\\ud800"}']


@pytest.mark.parametrize("options", [{}, {"holdout": 0.3, "max_tokens": 1003}, {"workers": 2}])
def test_bad_documents_are_left_out_counted_and_listed(
    corpus: Corpus, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    good = [json.dumps({"text": make_text(i)}) for i in range(120)]
    lines = [line for i, each in enumerate(good) for line in ([BAD[i % 4], each] if i % 3 == 0 else [each])]
    (tmp_path / "all.jsonl").write_text("\n".join([*lines, *BAD]))
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    with pytest.raises(ValueError, match=r"all\.jsonl:1: .*--on-bad skip"):
        build_shards(tmp_path / "all.jsonl", tokenizer, 8, tmp_path / "stopped", **options)
    assert not list(tmp_path.glob("stopped*"))
    build_shards(tmp_path / "good.jsonl", tokenizer, 8, tmp_path / "good", **options)
    monkeypatch.setattr("revpatch.corpus.chunks.CHUNK_DOCUMENTS", 3 if "workers" not in options else 7)
    manifest = build_shards(tmp_path / "all.jsonl", tokenizer, 8, tmp_path / "out", on_bad="skip", **options)
    assert tokens_of(tmp_path / "out") == tokens_of(tmp_path / "good")
    assert manifest.bad_documents == 44 if "max_tokens" not in options else 4 < manifest.bad_documents < 44
    assert len(manifest.bad) == min(20, manifest.bad_documents)
    assert manifest.bad[0].startswith("all.jsonl:1: expected one JSON object")
    assert str(tmp_path) not in " ".join(manifest.bad), "where it lay says nothing on another machine"
    (tmp_path / "bad.jsonl").write_text("no json\n" * 30)
    with pytest.raises(ValueError, match=r"30 could not be read: bad\.jsonl:1: expected one JSON object"):
        build_shards(tmp_path / "bad.jsonl", tokenizer, 16, tmp_path / "none", on_bad="skip")


def long_text(count: int) -> str:
    return "\n".join(make_text(i) for i in range(count))


@pytest.mark.parametrize(
    ("documents", "holdout", "told"),
    [
        (["", " \n", long_text(80), "\t"], 0.1, ""),
        (["漢字" * 2000], 0.1, ""),
        (["short one"], 0.1, r"train side .* is one document, so the last 0\.1 of it was held out: lower holdout"),
        ([make_text(3) * 3], 0.05, r"probe side .* is one document, so .*: raise holdout, .*<\|endoftext\|>"),
        ([long_text(80)] * 3, 0.001, r"of 3 documents 0 fell on this one: divide the text into more documents"),
        ([long_text(20 + i) for i in range(5)], 0.001, r"of 5 documents 0 fell on this one: set holdout to 0\.\d+,"),
        ([long_text(20 + i) for i in range(5)], 0.999, r"train side .* 0 fell on .* set holdout to 0\.\d+,"),
    ],
    ids=str,
)
def test_few_documents_are_held_out_or_it_is_said_how_they_can_be(
    corpus: Corpus, tokenizer: Any, tmp_path: Path, documents: list[str], holdout: float, told: str
) -> None:
    source = corpus(documents)
    if told:
        with pytest.raises(ValueError, match=told) as error:
            build_shards(source, tokenizer, 16, tmp_path / "out", holdout=holdout)
        if advised := re.search(r"set holdout to ([\d.]+),", str(error.value)):
            build_shards(source, tokenizer, 16, tmp_path / "out", holdout=float(advised[1]))
        return
    train = build_shards(source, tokenizer, 16, tmp_path / "out", holdout=holdout)
    probe = Manifest.read(tmp_path / "out_probe")
    bounded = build_shards(source, tokenizer, 16, tmp_path / "bounded", holdout=holdout, max_tokens=99)
    assert (bounded.tokens, bounded.holdout_rule) == (99, "tail"), "the tail is there, however early training ends"
    assert tokens_of(tmp_path / "bounded_probe") == tokens_of(tmp_path / "out_probe")
    assert (train.holdout_rule, probe.holdout_rule, train.documents, probe.documents) == ("tail", "tail", 1, 1)
    assert train.empty_documents + probe.empty_documents == len(documents) - 1
    sides = [texts_of(tmp_path / name, tokenizer)[0] for name in ("out", "out_probe")]
    text = max(documents, key=len)
    head, begun = text[: -len(text) // 8], sides[1][:20]
    assert sides[0].startswith(head)
    assert text.count(begun) and text.rindex(begun) >= len(head), "its end alone is held out"
    assert abs(probe.tokens / (train.tokens + probe.tokens) - holdout) < 0.02
