"""Corpora as people have them: what is read, what is named and why, and what is left out and counted; in tables."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from command import Call, one_line
from toy import Toy, make_text

from revpatch.corpus.documents import BadDocument, Document, Reading
from revpatch.corpus.sources import find_inputs, is_raw_source, read_documents

EOT = "<|endoftext|>"
ENGLISH = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 4
RUSSIAN = "Съешь ещё этих мягких французских булок, да выпей чаю.\n" * 4
CHINESE = "我能吞下玻璃而不伤身体。你好，世界\n今天天气很好，我们去公园玩吧。" * 4
FRENCH = "Le café était déjà très chaud, où êtes-vous ?\n" * 4


def read(*sources: object, column: str = "text", skip: int = 0) -> list[Document | BadDocument]:
    inputs = find_inputs([str(source) for source in sources])
    return [document for found in inputs for document in found.read(Reading(column, skip, (EOT, "</s>")))]


def texts(*sources: object, column: str = "text") -> list[str]:
    documents = read(*sources, column=column)
    assert all(isinstance(document, Document) for document in documents), documents
    return [document.text for document in documents if isinstance(document, Document)]


def lines(*values: object) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def tar(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            data = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
ONE_TWO = {"text": "one é\nmore"}, {"text": "two", "id": "second"}
KINDS = {
    "a.txt": "one é\nmore".encode(),
    "a.md": "one é\nmore".encode(),
    "a.jsonl": lines(*ONE_TWO),
    "a.ndjson": lines(*ONE_TWO),
    "a.json": json.dumps(ONE_TWO, indent=1).encode(),
    "a.csv": '\ufeffid,text\r\n,"one é\nmore"\r\n\r\nsecond,two\r\n'.encode(),
    "a.tsv": 'id\ttext\n\t"one é\nmore"\nsecond\ttwo\n'.encode(),
}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_in_every_packing_and_in_tars(tmp_path: Path, name: str, packing: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / (name + packing)).write_bytes(PACKED[packing](KINDS[name]))
    expected = ["one é\nmore"] if name in ("a.txt", "a.md") else ["one é\nmore", "two"]
    (tmp_path / "all.tar").write_bytes(tar((name + packing, PACKED[packing](KINDS[name]))))
    for source in (tmp_path / "in", tmp_path / "in" / (name + packing), f"wds:{tmp_path}/all.tar"):
        assert texts(source) == expected
        assert is_raw_source(str(source))
        assert [d.text for d in read(source, skip=1) if isinstance(d, Document)] == expected[1:]
    if len(expected) > 1:
        assert [d.id for d in read(tmp_path / "in")][1] == "second"


CONTENTS: dict[str, tuple[str, bytes, list[str]]] = {
    "one object": ("a.json", b'{\n"text": "one"}', ["one"]),
    "objects one after another": ("a.json", b'{"text":\n"one"}{"text": "two"}\n', ["one", "two"]),
    "lines named .json": ("a.json", lines(*ONE_TWO), ["one é\nmore", "two"]),
    "a long array": ("a.json", json.dumps([{"text": f"{i} é" * 900} for i in range(300)]).encode(), []),
    "an empty array": ("a.json", b" [ ] ", []),
    "semicolons": ("a.csv", b'x;text\n1;"a;b, ""c"""\n', ['a;b, "c"']),
    "words as formats begin with": (
        "a.jsonl",
        lines({"text": "PAR1 is a receptor."}, {"text": "BZh it says."}, {"text": "Rar! and ARROW1"}),
        ["PAR1 is a receptor.", "BZh it says.", "Rar! and ARROW1"],
    ),
    "a word as parquet begins with": ("a.csv", b"PAR1,text\n1,a\n", ["a"]),
    "a word as bzip2 begins with": ("BZh.txt", b"BZh it says.", ["BZh it says."]),
    "a word as Arrow begins with": ("a.csv", b"ARROW1,text\n1,a\n", ["a"]),
    "one column": ("a.csv", b"text\na\n\nb", ["a", "b"]),
    "a tab in a .csv": ("a.csv", b"n\ttext\n1\tb, c\n", ["b, c"]),
    "a field of a megabyte": ("a.csv", b"text\n" + b"word " * 200_000 + b"\n", ["word " * 200_000]),
    "a zstd file with a long window": ("a.jsonl.zst", b"--ultra --long=31", ["x" * 99]),
    "streams one after another": ("a.txt.bz2", bz2.compress(b"one") + bz2.compress(b"two"), ["onetwo"]),
    "xz and its padding": ("a.txt.xz", lzma.compress(b"one") + bytes(4) + lzma.compress(b"two") + bytes(8), ["onetwo"]),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_what_files_may_be_like(tmp_path: Path, case: str) -> None:
    name, data, expected = CONTENTS[case]
    if data.startswith(b"--"):
        packed = subprocess.run(
            ["zstd", "-q", *data.decode().split(), "-c"],
            input=lines({"text": "x" * 99}),
            capture_output=True,
            check=True,
        )
        data = packed.stdout
    if case == "a long array":
        expected = [value["text"] for value in json.loads(data)]
    (tmp_path / name).write_bytes(data)
    assert texts(tmp_path / name) == expected


STORIES: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "none": ("one\n", [("a.txt", "one\n")]),
    "lines of their own": (
        f"one\n{EOT}\ntwo\n\n{EOT}\n\nthree\n",
        [("a.txt:1", "one"), ("a.txt:2", "two\n"), ("a.txt:3", "\nthree\n")],
    ),
    "at both ends, doubled, of Windows": (
        f"\ufeff{EOT}{EOT}one\r\n{EOT}\r\ntwo{EOT}\n \n",
        [("a.txt:1", "one"), ("a.txt:2", "two")],
    ),
    "the tokenizer's own": (f"one</s>two{EOT}", [("a.txt:1", "one"), ("a.txt:2", "two")]),
    "an example of JSON": ('{"id": 3}\ntext: three\n', [("a.txt", '{"id": 3}\ntext: three\n')]),
    "almost": ("one<|endoftext|two", [("a.txt", "one<|endoftext|two")]),
}


@pytest.mark.parametrize("case", STORIES)
@pytest.mark.parametrize("buffer", [1, 7, 2**18])
def test_separators_end_documents(tmp_path: Path, case: str, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revpatch.corpus.readers.BUFFER_BYTES", buffer)
    text, expected = STORIES[case]
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(tmp_path / "a.txt") == [Document(*each) for each in expected]
    for skip in range(len(expected) + 1):
        assert read(tmp_path / "a.txt", skip=skip) == [Document(*each) for each in expected[skip:]]


def test_a_long_file_of_stories_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revpatch.corpus.readers.BUFFER_BYTES", 2**14)
    with (tmp_path / "a.txt").open("w") as file:
        file.writelines(f"{make_text(i)}\n{EOT}\n" * 20 for i in range(400))
    size = (tmp_path / "a.txt").stat().st_size
    (found,) = find_inputs([tmp_path / "a.txt"])
    tracemalloc.start()
    count = sum(1 for _ in found.read(Reading("text", 0, (EOT,))))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 8000
    assert most < size / 6


def with_a_broken_byte(text: str) -> bytes:
    data = text.encode()
    return data[:-9] + b"\xff" + data[-9:]


JUNK: dict[str, tuple[bytes, str, str]] = {  # what the message says, and how the text is got as it says
    **{
        f"{name}, {encoding}": (text.encode(encoding), "utf-16", f"iconv -f {encoding.lower()} -t utf-8")
        for name, text in (("English", ENGLISH), ("Russian", RUSSIAN), ("Chinese", CHINESE), ("French", FRENCH))
        for encoding in ("utf-16le", "utf-16be")
    },
    "a mark": (RUSSIAN.encode("utf-16"), "UTF-16", "iconv -f utf-16 -t utf-8"),
    "UTF-32": (ENGLISH.encode("utf-32-le"), "utf-32le", "iconv -f utf-32le -t utf-8"),
    "cp1252": (FRENCH.encode("cp1252"), "'Le café était déjà", "iconv -f cp1252 -t utf-8"),
    "a broken byte, Russian": (with_a_broken_byte(RUSSIAN), "bytes are broken", "iconv -c -f utf-8 -t utf-8"),
    "a broken byte, English": (with_a_broken_byte(ENGLISH), "1 bytes are broken", "iconv -c -f utf-8 -t utf-8"),
    "a run of NULs": (ENGLISH.encode() + bytes(600), "600 NULs", "tr -d '\\000'"),
    "one NUL": (ENGLISH.encode() + b"\0", "1 NUL among 297 bytes, the first at offset 296 (line 5)", "tr -d '\\000'"),
    "NULs of few": (b"a\0b" + ENGLISH.encode() * 9 + b"\1\1\1", "1 NUL", "tr -d '\\000'"),
}


@pytest.mark.parametrize("case", JUNK)
def test_junk_is_named_with_advice_that_works(tmp_path: Path, case: str) -> None:
    data, named, command = JUNK[case]
    (tmp_path / "a.txt").write_bytes(data)
    (found,) = read(tmp_path / "a.txt")
    assert isinstance(found, BadDocument) and found.id == "a.txt"
    assert f"{tmp_path}/a.txt: expected" in found.reason and named in found.reason, found.reason
    assert command in found.reason, found.reason
    done = subprocess.run(["bash", "-c", f"{command} < a.txt > b.txt"], cwd=tmp_path, check=False)
    assert done.returncode in (0, 1)  # iconv -c ends with 1 where it left something out
    ((text),) = texts(tmp_path / "b.txt")
    assert (
        text.strip("\ufeff")[:20]
        == {"E": ENGLISH, "R": RUSSIAN, "C": CHINESE, "F": FRENCH}.get(
            case[0] if ", " in case and case[0] != "a" else "", text
        )[:20]
    )


FOREIGN = {
    "cp1251": (RUSSIAN.encode("cp1251"), "another encoding (cp1251,"),
    "koi8-r, short": ("Привет, как дела?".encode("koi8-r"), "another encoding (cp1251,"),
    "gb18030": (CHINESE.encode("gb18030"), "another encoding (cp1251,"),
    "latin1 of UTF-16": (ENGLISH.encode("utf-16").decode("latin1").encode(), "UTF-16 that was converted as latin1"),
    "latin1 of cp1252": ("\x93quotes\x94 \x96 and \x85 more \x92".encode(), "cp1252 that is converted as latin1"),
    "replaced characters": (("\ufffd" * 9 + "x").encode(), "9 replacement characters"),
    "binary": (bytes(range(256)) * 9, "it is binary"),
    "control characters": (b"\x01\x02a" * 50, "it is binary"),
    "a PDF": (b"%PDF-1.4\nabc", "a PDF; make text of it"),
    "a zip": (b"PK\x03\x04" + bytes(40), "a zip file"),
    "git-LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "gzip": (gzip.compress(b"x" * 99), "ending .gz"),
    "AppleDouble": (b"\x00\x05\x16\x07" + bytes(60), "AppleDouble"),
}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_text_is_named_whatever_its_ending(tmp_path: Path, case: str, name: str) -> None:
    data, named = FOREIGN[case]
    if name != "a.txt" and case in ("replaced characters", "latin1 of cp1252"):
        data = lines({"text": data.decode()}) if name != "a.csv" else b"text\n" + data
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))) as error:
        list(read_documents([tmp_path / name]))
    if name in ("a.txt", "a.jsonl") or case not in (
        "cp1251",
        "koi8-r, short",
        "gb18030",
        "binary",
        "control characters",
    ):
        assert named in str(error.value)


def parquet(column: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), sink, row_group_size=700)
    return bytes(sink.getvalue().to_pybytes())


BROKEN_STRINGS = pyarrow.Array.from_buffers(
    pyarrow.string(), 3, pyarrow.array([b"a", b"b\xff", b"c"], pyarrow.binary()).buffers()
)
TWICE = (
    lines({"text": "a"})
    + b'{"text": "b", "text": "c"}\n'
    + b'{"text": "d", "n": 1, "n": 2, "more": {"text": 1, "text": 2}}\n'
)
ONE_BAD: dict[str, tuple[str, bytes, int, list[tuple[str, str]]]] = {  # good documents, and the bad ones
    "broken JSON": (
        "a.jsonl",
        lines({"text": "a"}) + b'{"text": "b\n' + lines({"text": "c"}),
        2,
        [("a.jsonl:2", "expected one JSON object")],
    ),
    "lines of an old Mac": ("a.jsonl", b'{"text": "a"}\r{"text": "b"}\r', 0, [("a.jsonl:1", "tr '\\r' '\\n' < FILE")]),
    "bytes": (
        "a.jsonl",
        lines({"text": "a"}) + b'{"text": "b\xff"}\n' + lines({"text": "c"}),
        2,
        [("a.jsonl:2", "expected UTF-8, found the byte 0xff")],
    ),
    "field": (
        "a.jsonl",
        lines({"text": "a"}, {"body": "b"}, {"text": "c"}),
        2,
        [("a.jsonl:2", "expected the field 'text', found 'body'")],
    ),
    **{
        f"the text twice, {name}": (
            name,
            data,
            2,
            [(f"{name}:2", "expected the field 'text' once, found it 2 times; keep one of them")],
        )
        for name, data in (
            ("a.jsonl", TWICE),
            ("a.ndjson", TWICE),
            ("a.jsonl.gz", gzip.compress(TWICE)),
            ("a.json", b"[" + TWICE.strip().replace(b"\n", b",") + b"]"),
        )
    },
    "null": ("a.jsonl", lines({"text": "a"}, {"text": None}), 1, [("a.jsonl:2", "found NoneType (null)")]),
    "NULs": ("a.jsonl", lines({"text": "a"}, {"text": "b" + "\0" * 50}), 1, [("a.jsonl:2", "50 NULs")]),
    "a NUL": ("a.jsonl", lines({"text": "a"}, {"text": ENGLISH + "\0"}), 1, [("a.jsonl:2", "1 NUL")]),
    "a NUL in a row": ("a.parquet", parquet(["a", ENGLISH + "\0"]), 1, [("a.parquet:2", "1 NUL")]),
    "JSON in a .txt": ("a.txt", lines(*ONE_TWO), 0, [("a.txt", "found JSON with the field 'text'; give its name")]),
    "an empty file": (
        "a.csv",
        b"",
        0,
        [("a.csv", "expected a first line that names the columns, found an empty file")],
    ),
    "blank lines": ("a.csv", b"\xef\xbb\xbf \n\n", 0, [("a.csv", "found an empty file; copy it again, or delete it")]),
    "nothing compressed": ("a.txt.gz", b"", 0, [("a.txt.gz", "expected a gzip file, found no bytes at all")]),
    "nothing of parquet": ("a.parquet", b"", 0, [("a.parquet", "expected a parquet file, found no bytes at all")]),
    "no object": (
        "a.json",
        b'[{"text": "a"}, 3, {"text": "c\xff"}, {"text": "d"}]',
        2,
        [("a.json:2", "expected an object"), ("a.json:3", "found the byte 0xff")],
    ),
    "wrapped": ("a.json", b'{"data": [{"text": "a"}]}', 0, [("a.json", "jq -c '.[\"data\"][]' FILE")]),
    "rows": (
        "a.csv",
        b'n,text\n1,a\n2,b,x\n3,c\xff\n4,"d "e"\n5,f\n',
        2,
        [
            ("a.csv:3", "expected 2 fields"),
            ("a.csv:4", "0xff"),
            ("a.csv:5", "a quote that is not closed or not written twice, up to line 5"),
        ],
    ),
    "a story": ("a.txt", f"a{EOT}b".encode() + b"\xff" + f"{EOT}c".encode(), 2, [("a.txt:2", "bytes are broken")]),
    "one null row": (
        "a.parquet",
        parquet(["x"] * 999 + [None] + ["y"] * 1000),
        1999,
        [("a.parquet:1000", "found NoneType (null)")],
    ),
    "strings that are no UTF-8": ("a.parquet", parquet(BROKEN_STRINGS), 2, [("a.parquet:2", "found the byte 0xff")]),
    "binary": (
        "a.parquet",
        parquet(pyarrow.array([b"a", "é".encode(), b"\xff"], pyarrow.binary())),
        2,
        [("a.parquet:3", "0xff")],
    ),
    "large strings": ("a.parquet", parquet(pyarrow.array(["a", "b"], pyarrow.large_string())), 2, []),
    "a dictionary": ("a.parquet", parquet(pyarrow.array(["a", "b", "a"]).dictionary_encode()), 3, []),
}


@pytest.mark.parametrize("case", ONE_BAD)
def test_one_bad_document_does_not_cost_the_others(tmp_path: Path, case: str) -> None:
    name, data, good, bad = ONE_BAD[case]
    (tmp_path / name).write_bytes(data)
    found = read(tmp_path / name)
    assert sum(isinstance(document, Document) for document in found) == good
    assert [document.id for document in found if isinstance(document, BadDocument)] == [name for name, _ in bad]
    reasons = [document.reason for document in found if isinstance(document, BadDocument)]
    for reason, (_, told) in zip(reasons, bad, strict=True):
        assert told in reason and reason.startswith(str(tmp_path)) and ";" in reason
    for skip in range(0, len(found) + 1, max(1, len(found) // 7)):
        assert read(tmp_path / name, skip=skip) == found[skip:]


CUT = {
    "a.json": (b'[{"text": "a"}, {"text": "b"', "found the end of the file within"),
    "d.json": (b'[{"text": "a"}, ', "found the end of the file, at character 16"),
    "e.json": (b'[{"text": "a"} {"text": "b"}]', "within the array that begins at character 0, at character 15"),
    "f.json": (b'[{"text": "a"}] {"text": "b"}', "found more after the array's end, at character 14"),
    "b.json": (b'[{"text": "a"}, {"text" "b"}]' + b" " * 99, "expected JSON: objects, or an array of them; found"),
    "c.json": (
        b'[{"text": "a", "n": ' + b"9" * 5000 + b"}]",
        "c.json: expected JSON: objects, or an array of them; found",
    ),
    "a.jsonl.xz": (lzma.compress(lines(*ONE_TWO))[:-20], "the xz file is broken or cut short"),
    "a.jsonl.bz2": (bz2.compress(b"x" * 99) + b"BZh9" + b"junk" * 9, "the bzip2 file is broken or cut short"),
    "a.txt.gz": (zstandard.compress(b"text"), "found zstd; give its name the ending .zst"),
    "b.txt.gz": (b"", "expected a gzip file, found no bytes at all; copy it again, or delete it. Or leave such"),
    "a.csv": (b"a,b\n1,2\n", "expected the field 'text', found 'a', 'b'"),
    "b.csv": (b"text,text\n1,2\n", "expected one column 'text', found 2"),
    "a.parquet": (parquet(pyarrow.array([["a", "b"]])), "expected text, found list<element: string>"),
    "b.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "a.zip": (b"PK\x03\x04", "unpack it (unzip "),
    "a.tar.gz": (b"", "name it wds:"),
    "a.docx": (b"PK\x03\x04", "pandoc"),
}


@pytest.mark.parametrize("name", CUT)
def test_files_that_give_nothing_more_are_refused_in_one_line(
    tmp_path: Path, name: str, toy: Toy, revpatch: Call
) -> None:
    data, told = CUT[name]
    (tmp_path / name).write_bytes(data)
    assert is_raw_source(str(tmp_path / name))
    result = revpatch("shards", "build", tmp_path / name, "--tokenizer", toy.base, "--out", tmp_path / "out")
    one_line(result, tmp_path / name, told)


def test_what_a_folder_has_and_is_not_read_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "mixed"
    for name in (
        "a.txt",
        "b.tar.gz",
        "c.PDF",
        "d.pdf",
        ".e.txt",
        "__MACOSX/._a.txt",
        "f",
        "sub/._g.txt",
        "sub/h.parquet.gz",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    (folder / "i.txt").symlink_to("nowhere")
    assert texts(folder) == ["text"]
    assert "mixed: files left out, as they are not read: 3 hidden (.NAME, __MACOSX), 2 .pdf" in caplog.text
    for told in ("1 .tar.gz", "1 without an ending", "1 .parquet.gz", "1 links that lead nowhere", "pdftotext"):
        assert told in caplog.text
    caplog.clear()
    assert texts(f"{folder}/[as]*") == ["text"] and "1 folders that match are left out" in caplog.text
    (folder / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"found none of them in it, but .*2 \.pdf"):
        find_inputs([folder])


def test_what_a_tar_has_and_is_not_read_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = tar(
        ("BZh.txt", b"text"),
        ("._a.txt", b"\0\5\x16\7"),
        ("__MACOSX/x/._b.txt", b"junk"),
        link("c.txt", "a.txt", tarfile.SYMTYPE),
        link("d.txt", "a.txt", tarfile.LNKTYPE),
        ("e.parquet", b"PAR1"),
    )
    (tmp_path / "a.tar").write_bytes(members)
    assert texts(f"wds:{tmp_path}/a.tar") == ["text"]
    assert "left out: 2 of macOS's own (._NAME, __MACOSX), 2 links, 1 .parquet (what a link points to" in caplog.text


SIX = [(f"{i}.txt", f"text {i}".encode()) for i in range(6)]
TARS: dict[str, tuple[bytes, str | None]] = {
    **{f".tar{packing}": (PACKED[packing](tar(*SIX)), None) for packing in PACKED},
    "one after another": (tar(*SIX[:4]) + tar(*SIX[4:]), None),
    "gzipped one after another": (gzip.compress(tar(*SIX[:4])) + gzip.compress(tar(*SIX[4:])), None),
    "without its end": (tar(*SIX)[: 6 * 1024], "head -c 1024 /dev/zero >> TAR"),
    "a hole of zeros": (tar(*SIX)[:1024] + bytes(2048) + tar(*SIX)[3072:], "found a header after 4 blocks of zeros"),
    "a zip": (b"PK\x03\x04" + bytes(2000), "it is a zip file"),
    "cut xz": (lzma.compress(tar(*SIX))[:-30], "broken or cut short"),
}


@pytest.mark.parametrize("case", TARS)
def test_tars_of_many_kinds(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    data, told = TARS[case]
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    if told is not None:
        with pytest.raises(ValueError, match=re.escape(f"wds:{path}: the tar is broken or cut short")) as error:
            texts(f"wds:{path}")
        assert told in str(error.value)
    if case == "without its end":
        subprocess.run(["bash", "-c", f"head -c 1024 /dev/zero >> {path}"], check=True)
    elif told is not None:
        return
    assert texts(f"wds:{path}") == [f"text {i}" for i in range(6)]
    assert ("2 tars one after another; all are read" in caplog.text) == ("one after another" in case)


def test_empty_files_do_not_cost_a_folder_its_build(tmp_path: Path, toy: Toy, revpatch: Call) -> None:
    """As a failed export or a full disk leaves them."""
    (tmp_path / "in").mkdir()
    for name in ("a.csv", "b.jsonl.gz", "c.parquet", "d.txt.zst"):
        (tmp_path / "in" / name).write_bytes(b"")
    (tmp_path / "in/e.txt").write_text("the patch learns what a stream brings " * 50)
    command = (
        "shards",
        "build",
        tmp_path / "in",
        "--tokenizer",
        toy.base,
        "--block-size",
        16,
        "--out",
        tmp_path / "out",
    )
    one_line(revpatch(*command), tmp_path / "in/a.csv", "--on-bad skip")
    assert revpatch(*command, "--on-bad", "skip").code == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["documents"], manifest["bad_documents"]) == (1, 4)
    assert [reason.split(":")[0] for reason in manifest["bad"]] == ["a.csv", "b.jsonl.gz", "c.parquet", "d.txt.zst"]


def test_a_bad_member_does_not_cost_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        tar(
            ("a.txt", b"\xff\xfea\0b\0"),
            ("b.jsonl", b'{"text": "b"}\n{\n'),
            ("c.json", b"[1"),
            ("d.txt.gz", b"x"),
            ("e.txt", b"e"),
        )
    )
    found = read(f"wds:{tmp_path}/a.tar")
    assert [document.id for document in found] == [
        "a.txt",
        "b.jsonl:1",
        "b.jsonl:2",
        "c.json:1",
        "c.json",
        "d.txt.gz",
        "e.txt",
    ]
    assert [isinstance(document, Document) for document in found] == [False, True, False, False, False, False, True]
    for skip in range(8):
        assert read(f"wds:{tmp_path}/a.tar", skip=skip) == found[skip:]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of 40 and 10 rows: saved, and as JSON and CSV."""
    folder = tmp_path_factory.mktemp("rows")
    values = {name: [f"{name} {i}" for i in range(count)] for name, count in (("train", 40), ("test", 10))}
    sets = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in values.items()}
    datasets.DatasetDict(sets).save_to_disk(str(folder / "saved"))
    for kind in ("jsonl", "csv"):
        (folder / kind).mkdir()
        for name, some in values.items():
            body = lines(*({"text": text} for text in some)) if kind == "jsonl" else "\n".join(["text", *some]).encode()
            (folder / kind / f"{name}.{kind}").write_bytes(body)
    return folder


@pytest.mark.parametrize("kind", ["saved", "jsonl", "csv"])
@pytest.mark.parametrize(
    ("split", "first", "last"),
    [("train", 0, 40), ("train[:10%]", 0, 4), ("train[5:7]", 5, 7), ("train[-3:]", 37, 40), ("train[50%:]", 20, 40)],
)
def test_slices_of_data_sets(rows: Path, kind: str, split: str, first: int, last: int) -> None:
    expected = [f"train {i}" for i in range(first, last)]
    assert texts(f"hf:{rows}/{kind}:{split}#text") == expected
    assert [d.text for d in read(f"hf:{rows}/{kind}:{split}", skip=1) if isinstance(d, Document)] == expected[1:]
    assert texts(f"hf:{rows}/{kind}:test[8:]+{split}") == ["test 8", "test 9", *expected]


@pytest.mark.parametrize(
    ("split", "told"),
    [
        ("valid", "expected one of the splits"),
        ("train[:x]", "expected a split such as"),
        ("train[", "expected hf:NAME"),
    ],
)
def test_splits_that_are_none(rows: Path, split: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        texts(f"hf:{rows}/saved:{split}")
    with pytest.raises(ValueError, match=r"save_to_disk wrote; name a split of it: hf:"):
        find_inputs([rows / "saved"])


ROLES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHARES = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


@pytest.mark.parametrize("column", ["text", "messages"])
@pytest.mark.parametrize(("name", "chat"), [("a.jsonl", ROLES), ("b.jsonl", SHARES), ("c.parquet", ROLES)])
def test_chats_are_named_with_a_line_that_makes_text_of_them(
    tmp_path: Path, column: str, name: str, chat: Any, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"messages": [chat, chat]}), path)
    else:
        path.write_bytes(lines({"messages": chat}, {"messages": chat}))
    with pytest.raises(ValueError, match=r"chat") as error:
        list(read_documents([path], column))
    found = re.search(r"python -c '([^']*)'", str(error.value))
    assert found and "\n" not in str(error.value)
    toy.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    toy.tokenizer.save_pretrained(tmp_path / "model")
    toy.tokenizer.chat_template = None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    code = found[1].replace("MODEL", str(tmp_path / "model")).replace("FILE", str(path))
    exec(code.replace('"json"', '"parquet"') if name.endswith("parquet") else code, {})
    assert texts(tmp_path / "chat.jsonl") == ["user: hi\nassistant: ho\n"] * 2
