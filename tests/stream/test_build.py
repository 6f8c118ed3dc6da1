"""Documents to shards: what the blocks hold, that they are the same every time, and what never leaks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from toy import make_text, make_tokenizer

from revpatch.corpus.build import build_shards
from revpatch.corpus.encode import is_held_out
from revpatch.corpus.progress import BuildProgress
from revpatch.shards.format import HEADER_BYTES, Manifest, member_name, stride_of
from revpatch.shards.shard_set import ShardSet

Corpus = Callable[..., Path]


def tokens_of(directory: Path) -> list[int]:
    with ShardSet(directory) as shards:
        return [int(token) for token in shards.read(np.arange(len(shards))).ravel()]


def texts_of(directory: Path, tokenizer: Any) -> list[str]:
    return str(tokenizer.decode(tokens_of(directory))).split("<|endoftext|>")


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


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
    assert manifest.blocks == whole // 8
    assert (manifest.licence, manifest.note, manifest.sources) == ("mine", "why", ("corpus.jsonl",))
    assert Manifest.read(tmp_path / "out") == manifest


def test_no_special_token_is_added_and_the_callers_truncation_is_not_used(corpus: Corpus, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    plain = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    source = corpus([make_text(i) for i in range(5)])
    build_shards([source], tokenizer, 8, tmp_path / "out")
    build_shards([source], plain, 8, tmp_path / "plain")
    assert tokens_of(tmp_path / "out") == tokens_of(tmp_path / "plain")
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 3, "the caller's state stays"


def test_members_lie_at_multiples_of_the_stride(built: Path) -> None:
    manifest = Manifest.read(built)
    block = 0
    for shard in manifest.shards:
        path = built / shard.name
        assert path.stat().st_size == shard.bytes
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert len(members) == shard.blocks
        for i, member in enumerate(members):
            assert member.name == member_name(block)
            assert member.offset == i * stride_of(manifest.block_bytes)
            assert member.offset_data == member.offset + HEADER_BYTES
            assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "revpatch", 0o644)
            block += 1


def test_webdataset_reads_the_same_blocks(built: Path) -> None:
    read = [
        np.frombuffer(sample["bin"], dtype="<u2")
        for sample in webdataset.WebDataset(
            [str(built / s.name) for s in Manifest.read(built).shards], shardshuffle=False
        )
    ]
    with ShardSet(built) as shards:
        np.testing.assert_array_equal(np.stack(read), shards.read(np.arange(len(shards))))


@pytest.mark.parametrize("block_size", [2, 255, 256, 300])
def test_any_block_size(corpus: Corpus, tokenizer: Any, tmp_path: Path, block_size: int) -> None:
    manifest = build_shards([corpus([make_text(i) for i in range(40)])], tokenizer, block_size, tmp_path / "out")
    assert len(tokens_of(tmp_path / "out")) == manifest.blocks * block_size


def test_a_large_vocabulary_takes_four_bytes(corpus: Corpus, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(2**16)])
    manifest = build_shards([corpus(["<65535><65300> x"] * 4)], tokenizer, 4, tmp_path / "out")
    assert manifest.dtype == "uint32"
    expected = tokenizer("<65535><65300> x")["input_ids"]
    assert max(expected) > 2**16
    assert tokens_of(tmp_path / "out")[: len(expected)] == expected


def test_rebuilding_gives_the_same_bytes(corpus: Corpus, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    source = corpus([make_text(i) for i in range(80)])
    build_shards([source], tokenizer, 16, tmp_path / "one", holdout=0.3, blocks_per_shard=10)
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    monkeypatch.setattr("revpatch.corpus.chunks.CHUNK_DOCUMENTS", 7)
    build_shards([source], make_tokenizer(), 16, tmp_path / "deep" / "two", holdout=0.3, blocks_per_shard=10)
    for suffix in ("", "_probe"):
        assert files_of(tmp_path / f"one{suffix}") == files_of(tmp_path / "deep" / f"two{suffix}")


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "corpus.jsonl", "out"], (
        "no other folder is left"
    )


def test_a_folder_of_other_things_is_refused_before_any_work(corpus: Corpus, tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="no set of shards"):
        build_shards([corpus(["x" * 100])], tokenizer, 8, out, progress=lambda _: pytest.fail("it began"))
    with pytest.raises(FileExistsError, match="found a file"):
        build_shards([corpus(["x" * 100])], tokenizer, 8, out / "thesis.tex")
    assert files_of(out) == {"thesis.tex": b"x"}


def test_a_build_that_fails_leaves_nothing(corpus: Corpus, tokenizer: Any, tmp_path: Path) -> None:
    source = corpus([make_text(i) for i in range(2000)])
    with source.open("a") as file:
        file.write("no json\n")
    with pytest.raises(ValueError, match=r"corpus\.jsonl:2001"):
        build_shards([source], tokenizer, 8, tmp_path / "out", holdout=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize(("taken", "free"), [("out_probe", "out"), ("out", "out_probe")])
def test_both_sides_are_installed_or_neither(
    corpus: Corpus, tokenizer: Any, tmp_path: Path, taken: str, free: str
) -> None:
    source = corpus([make_text(i) for i in range(50)])
    build_shards([corpus([make_text(i) for i in range(9)], "o.jsonl")], tokenizer, 8, tmp_path / taken)
    with pytest.raises(FileExistsError, match=f"{taken}: holds another set"):
        build_shards([source], tokenizer, 8, tmp_path / "out", holdout=0.3)
    assert not (tmp_path / free).exists()


@pytest.mark.parametrize("texts", [[], [""], ["few"]])
def test_too_little_text_is_said(corpus: Corpus, tokenizer: Any, tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"not one block of 64 tokens: \d documents"):
        build_shards([corpus(texts)], tokenizer, 64, tmp_path / "out")
    with pytest.raises(ValueError, match="on the probe side of holdout 1e-06"):
        build_shards([corpus(["long " * 200])], tokenizer, 64, tmp_path / "out", holdout=1e-6)
    with pytest.raises(ValueError, match="full with max_tokens 64 after 1 documents of both sides: raise max_tokens"):
        build_shards([corpus(["long " * 200] * 2)], tokenizer, 64, tmp_path / "out", holdout=1e-6, max_tokens=64)
    with pytest.raises(ValueError, match="no source at all"):
        build_shards([], tokenizer, 64, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"block_size": 1}, "block_size is 1"),
        ({"holdout": 1.0}, "holdout is 1.0"),
        ({"holdout": -0.1}, "holdout is -0.1"),
        ({"max_tokens": 7}, "max_tokens is 7"),
        ({"blocks_per_shard": 0}, "blocks_per_shard is 0"),
    ],
)
def test_impossible_numbers(corpus: Corpus, tokenizer: Any, tmp_path: Path, arguments: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_shards([corpus(["x" * 100])], tokenizer, **{"block_size": 8, "out": tmp_path / "out", **arguments})


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


def test_max_tokens_does_not_depend_on_batches(
    corpus: Corpus, tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    source = corpus([make_text(i) if i % 3 else "" for i in range(300)])
    for name, batch in (("one", 512), ("two", 5)):
        monkeypatch.setattr("revpatch.corpus.chunks.CHUNK_DOCUMENTS", batch)
        build_shards([source], tokenizer, 8, tmp_path / name, holdout=0.3, max_tokens=1003)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert files_of(tmp_path / "one_probe") == files_of(tmp_path / "two_probe")


def test_holdout_takes_whole_documents_and_never_leaks(corpus: Corpus, tokenizer: Any, tmp_path: Path) -> None:
    texts = [make_text(i) for i in range(300)]
    source = corpus(texts + texts[:100] + texts[50:150])  # duplicates, as real corpora have
    train = build_shards([source], tokenizer, 4, tmp_path / "out", holdout=0.25)
    probe = Manifest.read(tmp_path / "out_probe")
    assert (train.split, probe.split) == ("train", "probe")
    assert train.documents + probe.documents == 500
    assert 50 < probe.documents < 200
    # The last pieces are cut where the last block ends.
    in_train = set(texts_of(tmp_path / "out", tokenizer)[:-1])
    in_probe = set(texts_of(tmp_path / "out_probe", tokenizer)[:-1])
    assert in_train and in_probe
    assert in_train | in_probe <= set(texts)
    assert not in_train & in_probe


def test_holdout_never_moves(corpus: Corpus, tokenizer: Any, tmp_path: Path) -> None:
    texts = [make_text(i) for i in range(200)]
    build_shards([corpus(texts)], tokenizer, 4, tmp_path / "few", holdout=0.25)
    build_shards(
        [corpus([make_text(i) for i in range(500, 700)] + texts[::-1])], tokenizer, 4, tmp_path / "many", holdout=0.25
    )
    probes = [set(texts_of(tmp_path / f"{name}_probe", tokenizer)[:-1]) for name in ("few", "many")]
    trains = [set(texts_of(tmp_path / name, tokenizer)[:-1]) for name in ("few", "many")]
    assert len(probes[0] - probes[1]) <= 1, "but for the last document, which may be cut"
    assert len(probes[0]) > 30
    assert not probes[0] & trains[1]
    assert not probes[1] & trains[0]


def test_the_holdout_is_of_the_size_asked_for_and_grows_with_it() -> None:
    texts = [make_text(i) for i in range(4000)]
    small = {text for text in texts if is_held_out(text, 0.05)}
    large = {text for text in texts if is_held_out(text, 0.2)}
    assert small < large
    assert abs(len(small) / 4000 - 0.05) < 0.015
    assert abs(len(large) / 4000 - 0.2) < 0.025
    # Pinned: were the hash to change, every probe set in the world would start to leak.
    assert sum(is_held_out(f"pin {i}", 0.5) << i for i in range(32)) == 1414414940


def test_progress_counts_up(corpus: Corpus, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("revpatch.corpus.chunks.CHUNK_DOCUMENTS", 10)
    seen: list[BuildProgress] = []
    source = corpus([make_text(i) for i in range(95)])
    manifest = build_shards([source], tokenizer, 8, tmp_path / "out", holdout=0.2, progress=seen.append)
    probe = Manifest.read(tmp_path / "out_probe")
    assert [p.documents for p in seen] == [*range(10, 91, 10), 95]
    assert seen[-1] == BuildProgress(
        95, manifest.tokens + probe.tokens, manifest.blocks + probe.blocks, source.stat().st_size, source.stat().st_size
    )


BAD = ["no json", '{"text": 3}', '{"other": "x"}', '{"text": "\\ud800"}']


@pytest.mark.parametrize(
    "options", [{}, {"holdout": 0.3}, {"max_tokens": 1003}, {"holdout": 0.3, "max_tokens": 1003}, {"workers": 2}]
)
def test_bad_documents_are_left_out_counted_and_listed(
    corpus: Corpus, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    good = [json.dumps({"text": make_text(i)}) for i in range(120)]
    lines = [line for i, each in enumerate(good) for line in ([BAD[i % 4], each] if i % 3 == 0 else [each])]
    (tmp_path / "all.jsonl").write_text("\n".join([*lines, *BAD]))
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    with pytest.raises(ValueError, match=r"all\.jsonl:1: .*--on-bad skip"):
        build_shards(tmp_path / "all.jsonl", tokenizer, 8, tmp_path / "stopped", **options)
    build_shards(tmp_path / "good.jsonl", tokenizer, 8, tmp_path / "good", **options)
    made = []
    for chunk in (512, 3) if "workers" not in options else (7,):
        monkeypatch.setattr("revpatch.corpus.chunks.CHUNK_DOCUMENTS", chunk)
        out = tmp_path / f"out{chunk}"
        made.append(build_shards(tmp_path / "all.jsonl", tokenizer, 8, out, on_bad="skip", **options))
        assert tokens_of(out) == tokens_of(tmp_path / "good")
        assert files_of(out) == files_of(tmp_path / f"out{'7' if 'workers' in options else '512'}")
    manifest = made[0]
    taken = 120 if "max_tokens" not in options else None
    assert manifest.bad_documents == 44 if taken else 4 < manifest.bad_documents < 44
    assert len(manifest.bad) == min(20, manifest.bad_documents)
    assert manifest.bad[0].startswith("all.jsonl:1: expected one JSON object")
    assert str(tmp_path) not in " ".join(manifest.bad), "where it lay says nothing on another machine"
    assert manifest.digest != Manifest.read(tmp_path / "good").digest, "as the sources' names differ"


def long_text(count: int) -> str:
    return "\n".join(make_text(i) for i in range(count))


@pytest.mark.parametrize(
    ("documents", "holdout", "told"),
    [
        ([long_text(80)], 0.1, ""),
        (["", " \n", long_text(80), "\t"], 0.1, ""),
        ([long_text(80).replace("\n", " ")], 0.1, ""),
        (["漢字" * 2000], 0.1, ""),
        (["short one"], 0.1, r"train side .* is one document, so the last 0\.1 of it was held out: lower holdout"),
        ([make_text(3) * 3], 0.05, r"probe side .* is one document, so .*: raise holdout, .*<\|endoftext\|>"),
        (["\n", " "], 0.1, r"not one block of 16 tokens: 0 documents"),
        ([long_text(80)] * 3, 0.001, r"of 3 documents 0 fell on this one: divide the text into more documents"),
        ([long_text(20 + i) for i in range(5)], 0.001, r"of 5 documents 0 fell on this one: set holdout to 0\.\d+,"),
        (
            [long_text(20 + i) for i in range(5)],
            0.999,
            r"train side .* 0 fell on .* set holdout to 0\.\d+,",
        ),
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


def test_the_only_document_is_held_out_alike_in_pieces_and_after_a_kill(
    corpus: Corpus, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = corpus(["", long_text(300), " "])
    build_shards(source, tokenizer, 16, tmp_path / "whole", holdout=0.2)
    monkeypatch.setattr("revpatch.corpus.chunks.LONG_CHARACTERS", 2000)
    monkeypatch.setattr("revpatch.corpus.chunks.PIECE_CHARACTERS", 900)
    monkeypatch.setattr("revpatch.corpus.build.CHECKPOINT_SECONDS", 0.0)
    steps = iter([3, 9, 12, 10**9])

    def killed(_: BuildProgress, calls: list[int] = []) -> None:  # noqa: B006  (counts all calls)
        calls.append(1)
        if len(calls) == limit:
            raise KeyboardInterrupt

    limit = 0
    for step in steps:
        limit += step
        with contextlib.suppress(KeyboardInterrupt):
            build_shards(source, tokenizer, 16, tmp_path / "out", holdout=0.2, progress=killed)
    for side in ("", "_probe"):
        assert files_of(tmp_path / f"out{side}") == files_of(tmp_path / f"whole{side}")


def test_marks_divide_plain_text(tokenizer: Any, tmp_path: Path) -> None:
    texts = [make_text(i) for i in range(60)]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(texts))
    train = build_shards(tmp_path / "stories.txt", tokenizer, 16, tmp_path / "out", holdout=0.2)
    probe = Manifest.read(tmp_path / "out_probe")
    assert (train.documents + probe.documents, train.holdout_rule) == (60, "hash")
    assert probe.documents > 3


@pytest.mark.parametrize("name", ["", "deep", "../text"])
def test_a_folder_within_a_source_is_refused(corpus: Corpus, tokenizer: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "text").mkdir()
    corpus([make_text(i) for i in range(20)], "text/a.jsonl")
    with pytest.raises((ValueError, FileExistsError), match=r"lies in|expected a new or empty folder"):
        build_shards(tmp_path / "text", tokenizer, 16, tmp_path / "text" / name)


def test_a_corpus_of_bad_documents_alone_names_the_first(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("no json\n" * 30)
    with pytest.raises(ValueError, match=r"30 could not be read: a\.jsonl:1: expected one JSON object"):
        build_shards(tmp_path / "a.jsonl", tokenizer, 16, tmp_path / "out", on_bad="skip")
