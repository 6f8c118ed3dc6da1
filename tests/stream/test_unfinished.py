"""The lock of an unfinished build is held while it is open, and let go however it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from revpatch.corpus import build
from revpatch.corpus.checkpoint import UnfinishedBuild
from revpatch.corpus.progress import BuildProgress
from revpatch.shards.format import Manifest

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


Edit = Callable[[Path], object]


def lines(count: int, first: int = 0) -> list[str]:
    return [json.dumps({"text": f"text {i} of words"}) + "\n" for i in range(first, first + count)]


def rewrite(name: str, *parts: list[str]) -> Edit:
    return lambda folder: (folder / name).write_text("".join(line for part in parts for line in part))


GOOD = lines(600)
MENDED = ['{"text": "mended"}\n']
EDITS: dict[str, tuple[Edit, str]] = {
    "the bad line is mended": (rewrite("b.jsonl", GOOD, MENDED), ""),
    "the bad line is taken out, others are put after it": (rewrite("b.jsonl", GOOD, lines(9, 900)), ""),
    "the file ends before the bad line": (rewrite("b.jsonl", GOOD), ""),
    "a later file is mended too": (
        lambda folder: (rewrite("b.jsonl", GOOD)(folder), rewrite("c.jsonl", MENDED)(folder)),
        "",
    ),
    "a later file is gone": (
        lambda folder: (rewrite("b.jsonl", GOOD)(folder), (folder / "c.jsonl").rename(folder / "c.off")),
        "",
    ),
    "a later file is new": (
        lambda folder: (rewrite("b.jsonl", GOOD)(folder), rewrite("d.jsonl", MENDED)(folder)),
        "",
    ),
    "a line that was read is another": (
        rewrite("b.jsonl", MENDED, GOOD[1:], MENDED),
        r"b\.jsonl: the first \d+ documents of it, which had been read .*, are not what they were; put back .*delete",
    ),
    "a line that was read is gone": (rewrite("b.jsonl", GOOD[1:], MENDED), r"b\.jsonl: the first \d+ documents of it"),
    "a line is put before": (rewrite("b.jsonl", MENDED, GOOD, MENDED), r"b\.jsonl: the first \d+ documents of it"),
    "the file is short": (rewrite("b.jsonl", GOOD[:3]), r"b\.jsonl: the first \d+ documents of it"),
    "a file that was read is another": (rewrite("a.jsonl", GOOD), r"a\.jsonl has changed after it had been read"),
    "a file that was read is gone": (
        lambda folder: (folder / "a.jsonl").unlink(),
        r"file 1 is .*b\.jsonl and was .*a\.jsonl, which had been read",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_source_may_be_mended_behind_what_was_read_of_it(
    edit: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("revpatch.corpus.chunks.CHUNK_DOCUMENTS", 50)
    text, change, told = tmp_path / "text", *EDITS[edit]
    text.mkdir()
    for name, parts in (
        ("a.jsonl", [lines(70, 700)]),
        ("b.jsonl", [GOOD, ["no json\n"]]),
        ("c.jsonl", [lines(5, 800)]),
    ):
        rewrite(name, *parts)(text)
    with pytest.raises(ValueError, match=r"b\.jsonl:601: .*--on-bad skip.* is kept in .*\.set\.building: mend what is"):
        build.build_shards(text, tokenizer, 16, tmp_path / "set", holdout=0.2)
    change(text)
    seen: list[BuildProgress] = []
    for _ in range(2):
        if told:  # and a second time, as nothing is forgotten of what was read
            with pytest.raises((ValueError, FileExistsError), match=told):
                build.build_shards(text, tokenizer, 16, tmp_path / "set", holdout=0.2)
    if not told:
        build.build_shards(text, tokenizer, 16, tmp_path / "set", holdout=0.2, progress=seen.append)
        assert seen[0].documents > 600, "it was resumed"
        build.build_shards(text, tokenizer, 16, tmp_path / "fresh", holdout=0.2)
        for side in ("", "_probe"):
            assert Manifest.read(tmp_path / f"set{side}") == Manifest.read(tmp_path / f"fresh{side}")


def test_a_stopped_build_is_resumed_without_what_is_bad_but_not_the_other_way_round(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("revpatch.corpus.chunks.CHUNK_DOCUMENTS", 50)
    path = tmp_path / "a.jsonl"
    path.write_text("".join([*GOOD, "no json\n", *lines(200, 700)]))

    def build_it(name: str, **options: Any) -> Manifest:
        return build.build_shards(path, tokenizer, 16, tmp_path / name, **options)

    def killed(progress: BuildProgress) -> None:
        if progress.documents > 700:
            raise KeyboardInterrupt

    with pytest.raises(ValueError, match=r"a\.jsonl:601"):
        build_it("set")
    with pytest.raises(KeyboardInterrupt):
        build_it("set", on_bad="skip", progress=killed)
    with pytest.raises(ValueError, match=r"left out 1 documents, the first being a\.jsonl:601: .* --on-bad skip"):
        build_it("set")
    manifest = build_it("set", on_bad="skip")
    assert manifest == build_it("fresh", on_bad="skip")
    assert (manifest.documents, manifest.bad_documents) == (800, 1)


def test_a_file_that_is_written_to_while_it_is_read_is_refused(
    corpus: Callable[..., Path], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("revpatch.corpus.chunks.CHUNK_DOCUMENTS", 5)
    monkeypatch.setattr(build, "CHECKPOINT_SECONDS", 0.0)
    path = corpus([f"text {i} of words" for i in range(90)])

    def grow(_: BuildProgress) -> None:
        with path.open("a") as file:
            file.write('{"text": "one more"}\n')

    with pytest.raises(ValueError, match=r"corpus\.jsonl: changed while it was read; let what writes to it"):
        build.build_shards(path, tokenizer, 16, tmp_path / "set", progress=grow)
    resumed = build.build_shards(path, tokenizer, 16, tmp_path / "set")
    assert resumed.documents == len(path.read_text().splitlines())
