"""What files give, and what is said of files that give nothing."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from revpatch.corpus.sources import Document, is_raw_source, read_documents


def test_one_document_a_text_file_and_one_a_line_of_jsonl_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("all of it\n\nis one", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "x", "id": "first"}\n\n{"text": "\u2028 é 😀", "id": 7}', encoding="utf-8"
    )
    (tmp_path / "c.JSONL.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n'))
    assert list(read_documents([tmp_path / "b.txt", str(tmp_path / "a.jsonl"), tmp_path / "c.JSONL.gz"])) == [
        Document("b.txt", "all of it\n\nis one"),
        Document("first", "x"),
        Document("a.jsonl:3", "\u2028 é 😀"),
        Document("c.JSONL.gz:1", "zipped"),
    ]


def test_file_names_that_look_like_urls_are_files(tmp_path: Path) -> None:
    path = tmp_path / "a #1 100% 😀.txt"
    path.write_text("text", encoding="utf-8")
    assert [d.text for d in read_documents([path])] == ["text"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "text"}')
    assert [d.text for d in read_documents([tmp_path / "a.txt", tmp_path / "a.jsonl"])] == ["text", "text"]


def test_another_field_may_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes"}')
    assert [d.text for d in read_documents([tmp_path / "a.jsonl"], text_column="body")] == ["yes"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "cut', "expected one JSON object"),
        (b'["text"]', "expected an object"),
        (b'{"body": "x", "title": "y"}', "'body', 'title'"),
        (b'{"text": 3}', "expected text, found int '3'"),
        (b'{"text": null}', "expected text, found NoneType"),
        (b'{"text": "\xff"}', "expected UTF-8, found the byte 0xff at offset 10"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, told: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: ") as error:
        list(read_documents([path]))
    assert told in str(error.value)
    assert ";" in str(error.value), "what to do comes after a semicolon"


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt: expected UTF-8, found the byte 0xe9 at offset 3"):
        list(read_documents([tmp_path / "a.txt"]))


def test_paths_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"gone\.txt: no such file"):
        read_documents([tmp_path / "a.txt", tmp_path / "gone.txt"])
    with pytest.raises(ValueError, match=r"a\.docx: expected a file ending in \.txt.*found '\.docx'"):
        read_documents([tmp_path / "a.txt", tmp_path / "a.docx"])


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip at all"])
def test_a_broken_gzip_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = bytearray(gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(5000))))
    if damage == "flipped":
        whole[len(whole) // 2] ^= 255
    path.write_bytes({"cut": bytes(whole[:-20]), "flipped": bytes(whole), "no gzip at all": b"plain"}[damage])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz"):
        list(read_documents([path]))


@pytest.mark.parametrize(
    "place",
    [
        "pipe:curl -sfL 'https://host/data/{name}?key=1'",
        "s3://bucket/[a]/set",
        "https://host/part.jsonl",
        f"pipe:cat {'x' * 300}/{{name}}",
    ],
)
def test_places_of_shards_are_not_taken_for_text(place: str) -> None:
    assert not is_raw_source(place)


def test_a_linked_folder_is_read_as_a_glob_reads_it_and_a_circle_is_not_run_in(tmp_path: Path) -> None:
    for name in ("corpus", "elsewhere", "corpus/.hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    (tmp_path / "corpus/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "corpus")
    assert [document.text for document in read_documents([tmp_path / "corpus"])] == ["corpus", "elsewhere"]


def test_a_folder_of_sets_with_a_stray_text_is_no_corpus(tmp_path: Path, built: Path) -> None:
    built.rename(tmp_path / "data")
    (tmp_path / "parent").mkdir()
    (tmp_path / "data").rename(tmp_path / "parent/mine")
    assert not is_raw_source(str(tmp_path / "parent"))
    (tmp_path / "parent/notes.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"parent: expected a set of shards or a folder of text, found both: .* mine, and"
    ):
        is_raw_source(str(tmp_path / "parent"))


def test_json_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "x", "n": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: expected one JSON object, found .*recursion"):
        list(read_documents([tmp_path / "a.jsonl"]))
