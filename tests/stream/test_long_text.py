"""Texts and lines that are too long for the memory give what short ones give."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from toy import make_text

from revpatch.stream import json_scan, long_text
from revpatch.stream.build import build_shards
from revpatch.stream.holdout import is_held_out
from revpatch.stream.json_scan import scan_object
from revpatch.stream.long_text import LongText
from revpatch.stream.sources import read_documents

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = Tokenizer.from_file(str(ROOT / "shards/demo_base/tokenizer.json"))
WORDS = ["it's", "x1", "—", "\n", "😀", "  ", "don't!", "été", "\t", "a,b", "漢字", "\u3000", " ", "(", "3.14"]


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def scanned(line: bytes, column: str = "text", window: int = 7) -> tuple[str, dict[str, Any] | None]:
    spool, source = io.BytesIO(), io.BytesIO(line)
    found = scan_object(lambda size: source.read(min(size, window)), spool, "here", column, first=False)
    return spool.getvalue().decode(), found


@given(st.integers(0, 2**32), st.integers(100, 300))
@settings(max_examples=40, deadline=None)
def test_pieces_have_the_tokens_of_the_whole(seed: int, limit: int) -> None:
    generator = random.Random(seed)
    text = " ".join(generator.choice([*WORDS, *make_text(seed).split()]) for _ in range(400))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "PIECE_CHARACTERS", limit)
        pieces = list(LongText(lambda: io.BytesIO(text.encode()), "here").pieces())
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert max(map(len, pieces)) <= limit
    assert [i for piece in pieces for i in ids(piece)] == ids(text)


def test_a_text_without_a_space_is_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "PIECE_CHARACTERS", 10)
    pieces = list(LongText(lambda: io.BytesIO(("漢" * 25).encode()), "here").pieces())
    assert pieces == ["漢" * 10, "漢" * 10, "漢" * 5]


@given(
    st.dictionaries(
        st.sampled_from(["id", "a", "é"]), st.sampled_from([None, -1.5e9, True, 'x"', [1, ["}"], {"text": "]"}], {}])
    ),
    st.text(),
    st.booleans(),
    st.integers(1, 30),
)
@example({}, '\\"\\\\', True, 1)
@example({}, "😀\ud7ff\\u", True, 3)
@settings(max_examples=150, deadline=None)
def test_a_scanned_object_gives_what_json_gives(fields: dict[str, Any], text: str, escaped: bool, window: int) -> None:
    line = json.dumps({**fields, "text": text, "last": [{"text": "no"}]}, ensure_ascii=escaped)
    try:
        data = line.encode()
    except UnicodeEncodeError:
        return
    found_text, found = scanned(data, window=window)
    assert found_text == json.loads(line)["text"]
    assert found == ({"id": fields["id"]} if isinstance(fields.get("id"), str) else {})


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "cut', "a string is not ended"),
        (b'{"text": "x"', "cut short"),
        (b'{"text": "x"} {"text": "y"}', "after its end"),
        (b'{"text": "a\\qb and more text"}', "Invalid"),
        (b'{"text": "a\\u12x4 and more text"}', "no such escape"),
        (b'{"text": "a\tb"}', "Invalid control character"),
        (b'["text"]', "expected an object"),
        (b'{"body": "x", "title": "y"}', "'body', 'title'"),
        (b'{"text": 3}', "expected text, found int '3'"),
        (b'{"text": null}', "expected text, found NoneType"),
        (b'{"text": ["x"]}', "expected text, found list"),
        (b'{"text": "\\ud800 and more text"}', "surrogate"),
        (b'{"text": "\xff"}', "expected UTF-8, found the byte 0xff at offset 10"),
        (b'{"a": [1, 2}, "text": "x"}', "expected"),
        (b'{"a": nope, "text": "x"}', "Expecting value"),
    ],
)
def test_a_long_line_that_is_wrong_is_told_as_a_short_one_is(line: bytes, told: str) -> None:
    for window in (1, 5, 1000):
        with pytest.raises(ValueError, match=r"^here: ") as error:
            scanned(line, window=window)
        assert told in str(error.value)


def test_blank_long_lines_and_fields_that_are_there_twice() -> None:
    assert scanned(b" \t" * 50 + "\u3000\n".encode())[1] is None
    assert scanned(b'{"text": "first", "text": "last"}')[0] == "last"


@pytest.fixture
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "LONG_BYTES", 500)
    monkeypatch.setattr(long_text, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(json_scan, "WINDOW_BYTES", 64)


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


def test_the_side_of_a_long_document_is_that_of_its_text() -> None:
    for i in range(50):
        text = make_text(i) * 20
        assert LongText(lambda t=text: io.BytesIO(t.encode()), "here").is_held_out(0.4) == is_held_out(text, 0.4)


def test_bytes_that_are_no_text_are_found_in_a_long_file(tmp_path: Path, low_limits: None) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode() * 777 + b"\xe9 and more")
    with pytest.raises(ValueError, match=r"a\.txt: expected UTF-8, found the byte 0xe9 at offset 1554"):
        list(read_documents([tmp_path / "a.txt"]))


PEAK = """
import sys
from pathlib import Path
from light_tokenizer import LightTokenizer
from revpatch.stream.build import build_shards

def memory(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024

before = memory("VmRSS")
build_shards(sys.argv[2], LightTokenizer(sys.argv[1]), 1024, sys.argv[3], max_tokens=int(sys.argv[4]))
print(memory("VmHWM") - before)
"""


def peak_of(source: Path, out: Path, max_tokens: int) -> float:
    """MiB that building took at its peak, above what the imports had taken. Not from getrusage, which inherits."""
    tokenizer = ROOT / "shards/demo_base/tokenizer.json"
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tokenizer), str(source), str(out), str(max_tokens)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT}/tests/stream"},
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


WORDY = json.dumps(" ".join(make_text(i) + ' \n"é' for i in range(2000)))[1:-1]


@pytest.mark.parametrize(
    ("part", "max_tokens"),
    [
        pytest.param(WORDY, 2_000_000, id="words"),
        pytest.param("漢字仮名" * 10_000, 2_000_000, id="no space"),
        pytest.param(WORDY, 10**9, id="to its end", marks=pytest.mark.slow),
    ],
)
def test_one_line_of_200_mb_takes_little_memory(tmp_path: Path, part: str, max_tokens: int) -> None:
    """All of it is read in any case; the quick ones end before all of it is tokenised."""
    source = tmp_path / "one.jsonl"
    with source.open("wb") as file:
        file.write(b'{"meta": [1, {"a": "b"}], "text": "')
        for _ in range(2 * 10**8 // len(part.encode())):
            file.write(part.encode())
        file.write(b'"}\n')
    assert peak_of(source, tmp_path / "out", max_tokens) < 250
