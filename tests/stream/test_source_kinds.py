"""Every kind of source gives its documents, in order, from any place on; and says what is wrong with it."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from revpatch.corpus.build import build_shards
from revpatch.corpus.documents import Document, Reading
from revpatch.corpus.sources import find_inputs, is_raw_source, name_of_source, parse_hub_spec, read_documents
from revpatch.shards import remote
from revpatch.shards.format import Manifest

TEXTS = ["first", "", "the second, with 😀, \x1b and \u2028", *(f"text {i} " * 9 for i in range(300))]


def texts_of(*sources: str | Path, column: str = "text") -> list[str]:
    return [document.text for document in read_documents(sources, column)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zst(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return bytes(sink.getvalue().to_pybytes())


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_parquet(path: Path, columns: dict[str, Any]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=50)


Make = Callable[[Path], str]


def _file(name: str, data: Callable[[], bytes]) -> Make:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(data())
        return str(folder / name)

    return make


def _parquet(folder: Path) -> str:
    write_parquet(folder / "a.parquet", {"n": list(range(len(TEXTS))), "text": TEXTS})
    return str(folder / "a.parquet")


def _folder(folder: Path) -> str:
    (folder / "all/deep").mkdir(parents=True)
    (folder / "all/a.jsonl").write_bytes(jsonl(TEXTS[:5]))
    (folder / "all/b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[5:90])))
    (folder / "all/deep/c.jsonl.zst").write_bytes(zst(jsonl(TEXTS[90:])))
    (folder / "all/.hidden.txt").write_text("no")
    (folder / "all/picture.png").write_text("no")
    return str(folder / "all")


def _saved(folder: Path) -> str:
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(str(folder / "saved #1"))
    return f"hf:{folder}/saved #1:train"


def _data_files(folder: Path) -> str:
    (folder / "set").mkdir()
    write_parquet(folder / "set/train-00000.parquet", {"body": TEXTS})
    return f"hf:{folder}/set:train#body"


def _members(folder: Path) -> str:
    halves = TEXTS[:100], TEXTS[100:]
    for number, half in enumerate(halves):
        members = {
            f"{i:03}.txt" if i % 2 else f"{i:03}.json": text.encode() if i % 2 else jsonl([text])
            for i, text in enumerate(half)
        }
        (folder / f"t{number}.tar").write_bytes(tar({"0.cls": b"3", **members}))
    return f"wds:{folder}/t{{0..1}}.tar"


KINDS: dict[str, Make] = {
    "jsonl": _file("a.jsonl", lambda: jsonl(TEXTS)),
    "gz": _file("a.jsonl.gz", lambda: gzip.compress(jsonl(TEXTS))),
    "zst of two frames": _file("a.jsonl.zst", lambda: zst(jsonl(TEXTS[:50])) + zst(jsonl(TEXTS[50:]))),
    "parquet": _parquet,
    "folder": _folder,
    "glob": lambda folder: f"{_folder(folder)}/**/*.jsonl*",
    "hf saved": _saved,
    "hf data files": _data_files,
    "wds": _members,
    "wds pipe": lambda folder: f"wds:pipe:cat {_members(folder).removeprefix('wds:')}",
    "names with [#] and 😀": _file("a [#1] 😀 *.jsonl", lambda: jsonl(TEXTS)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_texts_from_any_place_on(kind: str, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path)
    assert texts_of(spec) == TEXTS
    inputs = find_inputs([spec])
    counts = [len(list(found.read(Reading("text")))) for found in inputs]
    assert sum(counts) == len(TEXTS)
    for skip in (0, 1, 57, counts[-1] - 1, counts[-1]):
        read = [d.text for d in inputs[-1].read(Reading("text", skip)) if isinstance(d, Document)]
        assert read == TEXTS[sum(counts[:-1]) + skip :]
    assert is_raw_source(spec)


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".txt.zst"])
def test_a_text_file_is_one_document(tmp_path: Path, ending: str) -> None:
    text = "all of it\n\nis one é " * 40
    pack = {".txt": bytes, ".txt.gz": gzip.compress, ".txt.zst": zst}[ending]
    (tmp_path / f"a{ending}").write_bytes(pack(b"\xef\xbb\xbf" + text.encode()))
    assert texts_of(tmp_path / f"a{ending}") == [text]


def test_members_of_tars(tmp_path: Path) -> None:
    text = "long é 😀 " * 100
    pretty = json.dumps({"id": "named", "text": text}, indent=1).encode()
    (tmp_path / "a.tar").write_bytes(tar({"a.txt": text.encode(), "b.json": pretty, "c.txt": b"short"}))
    documents = list(read_documents([f"wds:{tmp_path}/a.tar"]))
    assert documents == [Document("a.txt", text), Document("named", text), Document("c.txt", "short")]


@pytest.mark.parametrize("cut", [1, 2, 400, -5])
def test_a_zst_file_that_is_cut_is_named(tmp_path: Path, cut: int) -> None:
    data = zst(jsonl(TEXTS))
    (tmp_path / "a.jsonl.zst").write_bytes(data[:-cut] if cut > 0 else b"plain")
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: the zstd file is broken or cut short"):
        texts_of(tmp_path / "a.jsonl.zst")


def test_parquet_that_is_broken_or_has_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, {"body": ["x", None], "n": [1, 2]})
    with pytest.raises(ValueError, match=r"a\.parquet: expected the field 'text', found 'body', 'n'.*--text-column"):
        texts_of(path)
    with pytest.raises(ValueError, match="row 2: field 'body': expected text, found NoneType"):
        texts_of(path, column="body")
    with pytest.raises(ValueError, match="field 'n': expected text, found int64"):
        texts_of(path, column="n")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet: expected a parquet file, found a broken one"):
        texts_of(path)


def damaged(data: bytes, damage: str) -> bytes:
    members = 1024  # header and data of each
    return {
        "on a member's edge": data[: 3 * members],
        "in a header": data[: 3 * members + 100],
        "in the data": data[: 3 * members + 700],
        "a zeroed header": data[: 2 * members] + bytes(512) + data[2 * members + 512 :],
        "a broken header": data[: 2 * members + 148] + b"\xff" * 8 + data[2 * members + 156 :],
        "empty": b"",
        "no tar": b"plain text" * 100,
    }[damage]


DAMAGES = ["on a member's edge", "in a header", "in the data", "a zeroed header", "a broken header", "empty", "no tar"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("url", ["{path}", "pipe:cat '{path}'"])
def test_a_tar_that_is_cut_or_overwritten_is_never_taken_for_a_short_one(tmp_path: Path, damage: str, url: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(damaged(tar({f"{i}.txt": b"text" for i in range(6)}), damage))
    with pytest.raises(ValueError, match=r"wds:.*a\.tar.*the tar is broken or cut short"):
        texts_of(f"wds:{url.format(path=path)}")


def test_tars_that_are_not_to_be_had(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    path = tmp_path / "a.tar"
    path.write_bytes(tar({"a.txt": b"text", "b.x.cls": b"3", "c": b"4"}))
    assert texts_of(f"wds:{path}") == ["text"]
    assert "left out: 1 .cls, 1 without an ending" in caplog.text
    with pytest.raises(ConnectionError, match="expected a tar, found OSError: the command ended with exit code 7"):
        texts_of(f"wds:pipe:cat '{path}'; exit 7")
    with pytest.raises(FileNotFoundError, match=r"t1\.tar: no such file"):
        texts_of(f"wds:{tmp_path}/t{{1..2}}.tar")
    path.write_bytes(tar({"a.png": b"1", "b.png": b"2"}))
    with pytest.raises(ValueError, match=r"expected members that end in .txt, .*, found 2 .png"):
        texts_of(f"wds:{path}")
    path.write_bytes(tar({"a.json": b'{"body": 1}'}))
    with pytest.raises(ValueError, match=r"member a.json: expected the field 'text', found 'body'"):
        texts_of(f"wds:{path}")
    path.write_bytes(tar({}))
    assert texts_of(f"wds:{path}") == []


@pytest.mark.parametrize(
    ("spec", "candidates", "split", "column"),
    [
        ("hf:imdb:train", [("imdb", None)], "train", None),
        ("hf:a/b:test#body", [("a/b", None), ("a", "b")], "test", "body"),
        ("hf:a/b/c:train", [("a/b", "c")], "train", None),
    ],
)
def test_specs_of_the_hub(spec: str, candidates: Any, split: str, column: str | None) -> None:
    parsed = parse_hub_spec(spec)
    assert (list(parsed.candidates), parsed.split, parsed.column) == (candidates, split, column)


def test_a_config_of_a_folder_that_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near").mkdir()
    head = "configs:\n- config_name: small\n  data_files: small.jsonl\n- config_name: large\n  data_files: large.jsonl"
    (tmp_path / "near/README.md").write_text(f"---\n{head}\n---\n")
    for name in ("small", "large"):
        (tmp_path / f"near/{name}.jsonl").write_bytes(jsonl([f"of {name}"]))
    assert texts_of("hf:near/small:train") == ["of small"]
    assert texts_of("hf:near/large:train") == ["of large"]
    (before,) = find_inputs(["hf:near/small:train"])
    (tmp_path / "near/small.jsonl").write_bytes(jsonl(["of another small"]))
    (after,) = find_inputs(["hf:near/small:train"])
    assert before.identity != after.identity, "an unfinished build of the other text is not gone on with"


def test_data_sets_that_are_not_to_be_had(tmp_path: Path) -> None:
    spec = _saved(tmp_path)
    with pytest.raises(ValueError, match="expected one of the splits 'train', found 'test'"):
        texts_of(spec.replace(":train", ":test"))
    with pytest.raises(ValueError, match="row 1: expected the field 'body', found 'text'"):
        texts_of(f"{spec}#body")
    with pytest.raises(ValueError, match=r"expected hf:NAME\[/CONFIG\]:SPLIT"):
        texts_of("hf:imdb")
    with pytest.raises(FileNotFoundError, match="no folder"):
        texts_of(f"hf:{tmp_path}/no/such:train")
    with pytest.raises(ConnectionError, match=r"hf:nobody/nothing:train: the hub can't be reached"):
        texts_of("hf:nobody/nothing:train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="datasets can't read"):
        texts_of(f"hf:{tmp_path}/empty:train")


def test_folders_and_globs_without_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with files that end in .txt.*found none"):
        read_documents([tmp_path])
    with pytest.raises(FileNotFoundError, match="no file matches"):
        read_documents([f"{tmp_path}/*.txt"])
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"a\.docx: expected a file ending in"):
        read_documents([f"{tmp_path}/a.*"])


def test_what_is_a_raw_source(tmp_path: Path, built: Path) -> None:
    assert is_raw_source("some/*.jsonl.zst")
    assert is_raw_source("gone.txt")
    assert not is_raw_source(str(built))
    assert not is_raw_source(str(tmp_path / "gone"))
    (tmp_path / "folder").mkdir()
    assert not is_raw_source(str(tmp_path / "folder"))
    (tmp_path / "folder/a.txt").write_text("x")
    assert is_raw_source(str(tmp_path / "folder"))
    (built / "notes.txt").write_text("x")
    assert not is_raw_source(str(built)), "a folder of shards"


def test_manifests_name_no_folder_of_this_machine(tmp_path: Path, tokenizer: Any) -> None:
    sources = [_folder(tmp_path), f"{tmp_path}/all/*.jsonl", _saved(tmp_path), _members(tmp_path)]
    build_shards(sources, tokenizer, 16, tmp_path / "out")
    named = Manifest.read(tmp_path / "out").sources
    assert named == ("all", "*.jsonl", "hf:saved #1:train", "wds:t{0..1}.tar")
    assert name_of_source("hf:a/b:train") == "hf:a/b:train"
    for kind in ("", "wds:"):
        assert name_of_source(f"{kind}/corpora/caf\udce9.tar") == f"{kind}caf\\udce9.tar", "a manifest is UTF-8"


def test_bad_input_of_many_kinds_leaves_no_half_set(tmp_path: Path, tokenizer: Any) -> None:
    """Each either builds whole, or is refused and leaves nothing."""
    path = tmp_path / "a.jsonl"
    for lines, told in (
        (b"", "not one block"),
        (jsonl([""] * 9), r"0 documents \(9 more were empty\)"),
        (jsonl(["tiny"]), "not one block"),
        (jsonl(TEXTS) + b'{"text": "\xff"}', "expected UTF-8"),
        (b"\x00" * 100, "expected text, found 100 NULs"),
    ):
        path.write_bytes(lines)
        with pytest.raises(ValueError, match=told):
            build_shards(path, tokenizer, 64, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
