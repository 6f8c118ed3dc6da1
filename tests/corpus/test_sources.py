"""Corpora as people have them: what is read, what is named and why, and what is left out and counted; in tables."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from built import lines, tar
from command import Call, one_line
from toy import Toy

from revpatch.corpus.build import build_shards
from revpatch.corpus.documents import BadDocument, Document, Reading
from revpatch.corpus.sources import find_inputs, is_raw_source, name_of_source, parse_hub_spec, read_documents
from revpatch.shards.format import Manifest

EOT = "<|endoftext|>"
ENGLISH = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 4
RUSSIAN = "Съешь ещё этих мягких французских булок, да выпей чаю.\n" * 4
CHINESE = "我能吞下玻璃而不伤身体。你好，世界\n今天天气很好，我们去公园玩吧。" * 4
FRENCH = "Le café était déjà très chaud, où êtes-vous ?\n" * 4


def read(*sources: object, column: str = "text", skip: int = 0) -> list[Document | BadDocument]:
    inputs = find_inputs([str(source) for source in sources])
    return [document for found in inputs for document in found.read(Reading(column, skip, (EOT, "</s>")))]


def texts(*sources: object, column: str = "text", skip: int = 0) -> list[str]:
    documents = read(*sources, column=column, skip=skip)
    assert all(isinstance(document, Document) for document in documents), documents
    return [document.text for document in documents if isinstance(document, Document)]


def parquet(column: Any, name: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({name: column}), sink, row_group_size=700)
    return bytes(sink.getvalue().to_pybytes())


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
ONE_TWO = {"text": "one é\nmore"}, {"text": "two", "id": "second"}
KINDS = {
    "a.txt": "\ufeffone é\nmore".encode(),
    "a.md": "one é\nmore".encode(),
    "a.jsonl": b"\xef\xbb\xbf\n" + lines(*ONE_TWO),
    "a.ndjson": lines(*ONE_TWO),
    "a.json": json.dumps(ONE_TWO, indent=1).encode(),
    "a.csv": '\ufeffid,text\r\n,"one é\nmore"\r\n\r\nsecond,two\r\n'.encode(),
    "a.tsv": 'id\ttext\n\t"one é\nmore"\nsecond\ttwo\n'.encode(),
}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_in_every_packing_and_in_tars(tmp_path: Path, name: str, packing: str) -> None:
    (tmp_path / "in #1 😀").mkdir()
    (tmp_path / "in #1 😀" / (name + packing)).write_bytes(PACKED[packing](KINDS[name]))
    expected = ["one é\nmore"] if name in ("a.txt", "a.md") else ["one é\nmore", "two"]
    (tmp_path / "all.tar").write_bytes(tar((name + packing, PACKED[packing](KINDS[name]))))
    for source in (tmp_path / "in #1 😀", tmp_path / "in #1 😀" / (name + packing), f"wds:{tmp_path}/all.tar"):
        assert texts(source) == expected
        assert is_raw_source(str(source))
        assert texts(source, skip=1) == expected[1:]
    if len(expected) > 1:
        assert [d.id for d in read(tmp_path / "in #1 😀")][1] == "second"


LONG = [{"text": f"{i} é" * 900} for i in range(300)]
CONTENTS: dict[str, tuple[str, bytes, list[str]]] = {
    "one object": ("a.json", b'{\n"text": "one"}', ["one"]),
    "objects one after another": ("a.json", b'{"text":\n"one"}{"text": "two"}\n', ["one", "two"]),
    "a long array": ("a.json", json.dumps(LONG).encode(), [value["text"] for value in LONG]),
    "an empty array": ("a.json", b" [ ] ", []),
    "semicolons": ("a.csv", b'x;text\n1;"a;b, ""c"""\n', ['a;b, "c"']),
    "a word as parquet begins with": ("a.csv", b"PAR1,text\n1,a\n", ["a"]),
    "a tab in a .csv": ("a.csv", b"n\ttext\n1\tb, c\n", ["b, c"]),
    "a field of a megabyte": ("a.csv", b"text\n" + b"word " * 200_000 + b"\n", ["word " * 200_000]),
    "streams one after another": ("a.txt.bz2", bz2.compress(b"one") + bz2.compress(b"two"), ["onetwo"]),
    "frames of zstd": ("a.txt.zst", zstandard.compress(b"one") + zstandard.compress(b"two"), ["onetwo"]),
    "xz and its padding": ("a.txt.xz", lzma.compress(b"one") + bytes(4) + lzma.compress(b"two") + bytes(8), ["onetwo"]),
    "a dictionary": ("a.parquet", parquet(pyarrow.array(["a", "b", "a"]).dictionary_encode()), ["a", "b", "a"]),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_what_files_may_be_like(tmp_path: Path, case: str) -> None:
    name, data, expected = CONTENTS[case]
    (tmp_path / name).write_bytes(data)
    assert texts(tmp_path / name) == expected


STORIES: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "lines of their own": (
        f"one\n{EOT}\ntwo\n\n{EOT}\n\nthree\n",
        [("a.txt:1", "one"), ("a.txt:2", "two\n"), ("a.txt:3", "\nthree\n")],
    ),
    "at both ends, doubled, of Windows": (
        f"\ufeff{EOT}{EOT}one\r\n{EOT}\r\ntwo{EOT}\n \n",
        [("a.txt:1", "one"), ("a.txt:2", "two")],
    ),
    "the tokenizer's own": (f"one</s>two{EOT}", [("a.txt:1", "one"), ("a.txt:2", "two")]),
    "almost": ("one<|endoftext|two", [("a.txt", "one<|endoftext|two")]),
}


@pytest.mark.parametrize("case", STORIES)
@pytest.mark.parametrize("buffer", [1, 7, 2**18])
def test_separators_end_documents(tmp_path: Path, case: str, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revpatch.corpus.readers.BUFFER_BYTES", buffer)
    text, expected = STORIES[case]
    (tmp_path / "a.txt").write_bytes(text.encode())
    for skip in range(len(expected) + 1):
        assert read(tmp_path / "a.txt", skip=skip) == [Document(*each) for each in expected[skip:]]


@pytest.mark.parametrize("name", ["a.txt", "a.tar", "a.parquet"])
def test_what_was_read_is_not_held(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revpatch.corpus.readers.BUFFER_BYTES", 2**14)
    stories = [np.random.default_rng(i).bytes(5000).hex() for i in range(4000 if name == "a.parquet" else 600)]
    if name == "a.txt":
        (tmp_path / name).write_text(f"\n{EOT}\n".join(stories))
    elif name == "a.tar":
        (tmp_path / name).write_bytes(tar(*((f"{i}.txt", story.encode()) for i, story in enumerate(stories))))
    else:
        table = pyarrow.table({"text": stories})
        pyarrow.parquet.write_table(table, tmp_path / name, data_page_size=2**16, use_dictionary=False)
        del table
    (found,) = find_inputs([f"{'wds:' * (name == 'a.tar')}{tmp_path}/{name}"])
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    most = max(pyarrow.total_allocated_bytes() - before for _ in found.read(Reading("text", 0, (EOT,))))
    _, traced = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert traced + most < sum(map(len, stories)) / 2


JUNK: dict[str, tuple[bytes, str, str]] = {  # what the message says, and how the text is got as it says
    **{
        f"{name}, {encoding}": (text.encode(encoding), "utf-16", f"iconv -f {encoding.lower()} -t utf-8")
        for name, text in (("English", ENGLISH), ("Russian", RUSSIAN), ("Chinese", CHINESE))
        for encoding in ("utf-16le", "utf-16be")
    },
    "a mark": (RUSSIAN.encode("utf-16"), "UTF-16", "iconv -f utf-16 -t utf-8"),
    "cp1252": (FRENCH.encode("cp1252"), "'Le café était déjà", "iconv -f cp1252 -t utf-8"),
    "a broken byte": (RUSSIAN.encode()[:-9] + b"\xff" + b"x", "bytes are broken", "iconv -c -f utf-8 -t utf-8"),
    "one NUL": (ENGLISH.encode() + b"\0", "1 NUL among 297 bytes, the first at offset 296 (line 5)", "tr -d '\\000'"),
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
    (text,) = texts(tmp_path / "b.txt")
    assert text.strip("\ufeff")[:20] in [known[:20] for known in (ENGLISH, RUSSIAN, CHINESE, FRENCH)]


FOREIGN = {
    "cp1251": (RUSSIAN.encode("cp1251"), "another encoding (cp1251,"),
    "latin1 of UTF-16": (ENGLISH.encode("utf-16").decode("latin1").encode(), "UTF-16 that was converted as latin1"),
    "latin1 of cp1252": ("\x93quotes\x94 \x96 and \x85 more \x92".encode(), "cp1252 that is converted as latin1"),
    "replaced characters": (("\ufffd" * 9 + "x").encode(), "9 replacement characters"),
    "binary": (bytes(range(256)) * 9, "it is binary"),
    "a PDF": (b"%PDF-1.4\nabc", "a PDF; make text of it"),
    "git-LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_text_is_named(tmp_path: Path, case: str, name: str) -> None:
    data, named = FOREIGN[case]
    if name == "a.jsonl" and case in ("replaced characters", "latin1 of cp1252"):
        data = lines({"text": data.decode()})
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{name}")) as error:
        list(read_documents([tmp_path / name]))
    assert named in str(error.value)


ABC = pyarrow.array([b"a", b"b\xff", b"c"], pyarrow.binary())
TWICE = lines({"text": "a"}) + b'{"text": "b", "text": "c"}\n{"text": "d", "n": 1, "n": 2, "more": {"text": 1}}\n'
ONCE = "expected the field 'text' once, found it 2 times; keep one of them"
AROUND = lines({"text": "a"}), lines({"text": "c"})
ONE_BAD: dict[str, tuple[str, bytes, int, list[tuple[str, str]]]] = {  # good documents, and the bad ones
    "broken JSON": ("a.jsonl", (b'{"text": "b\n').join(AROUND), 2, [("a.jsonl:2", "expected one JSON object")]),
    "an old Mac": ("a.jsonl", b'{"text": "a"}\r{"text": "b"}\r', 0, [("a.jsonl:1", "tr '\\r' '\\n' < FILE")]),
    "bytes": (
        "a.jsonl",
        (b'{"text": "b\xff"}\n').join(AROUND),
        2,
        [("a.jsonl:2", "expected UTF-8, found the byte 0xff")],
    ),
    "the text twice, array": ("a.json", b"[" + TWICE.strip().replace(b"\n", b",") + b"]", 2, [("a.json:2", ONCE)]),
    "null": ("a.jsonl", lines({"text": "a"}, {"text": None}), 1, [("a.jsonl:2", "found NoneType (null)")]),
    "a NUL in a row": ("a.parquet", parquet(["a", ENGLISH + "\0"]), 1, [("a.parquet:2", "1 NUL")]),
    "JSON in a .txt": ("a.txt", lines(*ONE_TWO), 0, [("a.txt", "found JSON with the field 'text'; give its name")]),
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
    "a null row": ("a.parquet", parquet(["x"] * 999 + [None] + ["y"]), 1000, [("a.parquet:1000", "NoneType (null)")]),
    "binary": ("a.parquet", parquet(ABC), 2, [("a.parquet:2", "0xff")]),
}


@pytest.mark.parametrize("case", ONE_BAD)
def test_one_bad_document_does_not_cost_the_others(tmp_path: Path, case: str) -> None:
    name, data, good, bad = ONE_BAD[case]
    (tmp_path / name).write_bytes(data)
    found = read(tmp_path / name)
    assert sum(isinstance(document, Document) for document in found) == good
    reasons = [(document.id, document.reason) for document in found if isinstance(document, BadDocument)]
    for (where, reason), (expected, told) in zip(reasons, bad, strict=True):
        assert where == expected and told in reason and reason.startswith(str(tmp_path)) and ";" in reason
    for skip in range(0, len(found) + 1, max(1, len(found) // 7)):
        assert read(tmp_path / name, skip=skip) == found[skip:]


MANY = lines(*({"text": f"text {i}"} for i in range(300)))
CUT: dict[str, list[tuple[bytes, str]]] = {
    "a.json": [
        (b'[{"text": "a"}, {"text": "b"', "found the end of the file within"),
        (b'[{"text": "a"}, ', "found the end of the file, at character 16"),
        (b'[{"text": "a"} {"text": "b"}]', "within the array that begins at character 0, at character 15"),
        (b'[{"text": "a"}] {"text": "b"}', "found more after the array's end, at character 14"),
    ],
    "a.jsonl.gz": [
        (gzip.compress(MANY)[:-20], "the gzip file is broken or cut short"),
        (gzip.compress(MANY)[:-8], "the gzip file is broken or cut short"),
        (zstandard.compress(b"text"), "found zstd; give its name the ending .zst"),
    ],
    "a.jsonl.xz": [
        (lzma.compress(lines(*ONE_TWO))[:-20], "the xz file is broken or cut short"),
        (lzma.compress(MANY)[:-20], "the xz file is broken or cut short"),
    ],
    "a.jsonl.bz2": [
        (bz2.compress(MANY)[:-9], "the bzip2 file is broken or cut short"),
        (bz2.compress(b"x" * 99) + b"BZh9" + b"junk" * 9, "the bzip2 file is broken or cut short"),
    ],
    "a.jsonl.zst": [
        (zstandard.compress(MANY)[:-1], "the zstd file is broken or cut short"),
        (zstandard.compress(MANY) + zstandard.compress(b"more " * 99)[:-4], "broken or cut short"),
        (b"plain", "the zstd file is broken or cut short"),
    ],
    "a.csv": [
        (b"a,b\n1,2\n", "expected the field 'text', found 'a', 'b'"),
        (b"text,text\n1,2\n", "expected one column 'text', found 2"),
    ],
    "a.parquet": [
        (parquet(pyarrow.array([["a", "b"]])), "expected text, found list<element: string>"),
        (parquet(["x"], "body"), "expected the field 'text', found 'body'"),
        (parquet(["x"])[:-9], "expected a parquet file, found a broken one"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ],
    "a.zip": [(b"PK\x03\x04", "unpack it (unzip ")],
    "a.tar.gz": [(b"", "name it wds:")],
    "a.docx": [(b"PK\x03\x04", "pandoc")],
}


@pytest.mark.parametrize("name", CUT)
def test_files_that_give_nothing_more_are_refused_in_one_line(
    tmp_path: Path, name: str, toy: Toy, revpatch: Call
) -> None:
    for data, told in CUT[name]:
        (tmp_path / name).write_bytes(data)
        assert is_raw_source(str(tmp_path / name))
        result = revpatch("shards", "build", tmp_path / name, "--tokenizer", toy.base, "--out", tmp_path / "out")
        one_line(result, tmp_path / name, told)
        assert [path.name for path in tmp_path.iterdir()] == [name]


# Folders, names, and data sets.


def test_what_a_folder_has_and_is_not_read_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "mixed"
    files = ("a.txt", "b.tar.gz", "c.PDF", "d.pdf", ".e.txt", "__MACOSX/._a.txt", "f", "sub/h.parquet.gz")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    (folder / "i.txt").symlink_to("nowhere")
    assert texts(folder) == ["text"]
    assert "mixed: files left out, as they are not read: 2 hidden (.NAME, __MACOSX), 2 .pdf" in caplog.text
    for told in ("1 .tar.gz", "1 without an ending", "1 .parquet.gz", "1 links that lead nowhere", "pdftotext"):
        assert told in caplog.text
    assert texts(f"{folder}/[as]*") == ["text"] and "1 folders that match are left out" in caplog.text
    (folder / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"found none of them in it, but .*2 \.pdf"):
        find_inputs([folder])


def test_what_is_a_raw_source_and_what_a_manifest_calls_it(tmp_path: Path, toy: Toy, tokenizer: Any) -> None:
    assert is_raw_source("some/*.jsonl.zst") and is_raw_source("gone.txt")
    for place in (
        "pipe:curl -sfL 'https://host/{name}?key=1'",
        "s3://bucket/[a]/set",
        "https://host/part.jsonl",
        "gone",
    ):
        assert not is_raw_source(place)
    (tmp_path / "folder/mine").mkdir(parents=True)
    assert not is_raw_source(str(tmp_path / "folder"))
    (tmp_path / "folder/a.txt").write_text("x " * 99)
    assert is_raw_source(str(tmp_path / "folder"))
    assert not is_raw_source(str(toy.shards("first")))
    (tmp_path / "t0.tar").write_bytes(tar(("a.txt", b"x")))
    sources = [tmp_path / "folder", f"{tmp_path}/folder/*.txt", f"wds:{tmp_path}/t{{0..0}}.tar"]
    named = build_shards(sources, tokenizer, 16, tmp_path / "out").sources
    assert named == Manifest.read(tmp_path / "out").sources == ("folder", "*.txt", "wds:t{0..0}.tar")
    assert name_of_source("hf:a/b:train") == "hf:a/b:train"
    assert name_of_source("wds:/corpora/caf\udce9.tar") == "wds:caf\\udce9.tar", "a manifest is UTF-8"
    (tmp_path / "out").rename(tmp_path / "folder/mine")
    with pytest.raises(ValueError, match=r"folder: expected a set of shards or a folder of text, found both: .* mine,"):
        is_raw_source(str(tmp_path / "folder"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of 40 and 10 rows: saved, and as JSON and parquet; and two configs."""
    folder = tmp_path_factory.mktemp("rows #1")
    values = {name: [f"{name} {i}" for i in range(count)] for name, count in (("train", 40), ("test", 10))}
    sets = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in values.items()}
    datasets.DatasetDict(sets).save_to_disk(str(folder / "saved"))
    for kind in ("jsonl", "parquet", "near"):
        (folder / kind).mkdir()
        for name, some in values.items():
            body = parquet(some) if kind == "parquet" else lines(*({"text": text} for text in some))
            (folder / kind / f"{name}.{kind.replace('near', 'jsonl')}").write_bytes(body)
    head = "configs:\n- config_name: small\n  data_files: train.jsonl\n- config_name: large\n  data_files: test.jsonl"
    (folder / "near/README.md").write_text(f"---\n{head}\n---\n")
    return folder


@pytest.mark.parametrize("kind", ["saved", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("split", "first", "last"),
    [("train", 0, 40), ("train[:10%]", 0, 4), ("train[-3:]", 37, 40), ("train[50%:]", 20, 40)],
)
def test_slices_of_data_sets(rows: Path, kind: str, split: str, first: int, last: int) -> None:
    expected = [f"train {i}" for i in range(first, last)]
    assert texts(f"hf:{rows}/{kind}:{split}#text") == expected
    assert texts(f"hf:{rows}/{kind}:{split}", skip=1) == expected[1:]
    assert texts(f"hf:{rows}/{kind}:test[8:]+{split}") == ["test 8", "test 9", *expected]


def test_configs_of_data_sets_and_specs(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(rows)
    assert texts("hf:near/small:train[:1]") == ["train 0"]
    assert texts("hf:near/large:train[:1]") == ["test 0"]
    (before,) = find_inputs(["hf:near/small:train"])
    (rows / "near/train.jsonl").write_bytes(lines({"text": "another"}))
    (after,) = find_inputs(["hf:near/small:train"])
    assert before.identity != after.identity, "an unfinished build of the other text is not resumed"
    for spec, candidates, split, column in (
        ("hf:imdb:train", [("imdb", None)], "train", None),
        ("hf:a/b:test#body", [("a/b", None), ("a", "b")], "test", "body"),
        ("hf:a/b/c:train", [("a/b", "c")], "train", None),
    ):
        parsed = parse_hub_spec(spec)
        assert (list(parsed.candidates), parsed.split, parsed.column) == (candidates, split, column)


@pytest.mark.parametrize(
    ("source", "kind", "told"),
    [
        ("hf:{rows}/saved:valid", ValueError, "expected one of the splits"),
        ("hf:{rows}/saved:train[:x]", ValueError, "expected a split such as"),
        ("hf:{rows}/saved:train[", ValueError, "expected hf:NAME"),
        ("hf:{rows}/saved:train#body", ValueError, "row 1: expected the field 'body', found 'text'"),
        ("hf:imdb", ValueError, r"expected hf:NAME\[/CONFIG\]:SPLIT"),
        ("hf:{rows}/no/such:train", FileNotFoundError, "no folder"),
        ("hf:nobody/nothing:train", ConnectionError, r"hf:nobody/nothing:train: the hub can't be reached"),
        ("{rows}/saved", ValueError, r"save_to_disk wrote; name a split of it: hf:"),
        ("{rows}/gone.txt", FileNotFoundError, r"gone\.txt: no such file"),
        ("{rows}/*.txt", FileNotFoundError, "no file matches"),
        ("{rows}/near/*.md*", ValueError, None),
        ("{rows}/empty", ValueError, r"expected a folder with files that end in .txt.*found none"),
        ("{rows}/empty.docx", ValueError, r"empty\.docx: expected a file ending in \.txt.*found '\.docx'"),
    ],
)
def test_sources_that_are_none(rows: Path, source: str, kind: type[Exception], told: str | None) -> None:
    (rows / "empty").mkdir(exist_ok=True)
    (rows / "empty.docx").write_text("x")
    if told is None:
        assert texts(source.format(rows=rows))
        return
    with pytest.raises(kind, match=told):
        texts(source.format(rows=rows))


ROLES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHARES = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


@pytest.mark.parametrize("column", ["text", "messages"])
@pytest.mark.parametrize(("name", "chat"), [("b.jsonl", SHARES), ("c.parquet", ROLES)])
def test_chats_are_named_with_a_line_that_makes_text_of_them(
    tmp_path: Path, column: str, name: str, chat: Any, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(parquet([chat, chat], "messages") if name == "c.parquet" else lines(*[{"messages": chat}] * 2))
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
