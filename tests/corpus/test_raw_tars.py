"""`wds:` tars, local or from anywhere: what is read of them; one that is cut or overwritten is never a shorter one."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import zstandard
from built import tar
from flaky_server import FlakyServer, drop, status

from revpatch.corpus.documents import BadDocument, Document, Reading
from revpatch.corpus.sources import find_inputs, is_raw_source, read_documents
from revpatch.shards import remote

SIX = [(f"{i}.txt", f"text {i} é".encode()) for i in range(6)]
TEXTS = [f"text {i} é" for i in range(6)]
EACH = 1024  # bytes of a member: its header and its data


def texts(source: str) -> list[str]:
    return [document.text for document in read_documents([source])]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    (tmp_path / "a.tar").write_bytes(tar(*SIX))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar(*SIX)))
    flaky = FlakyServer(tmp_path)
    yield flaky
    flaky.close()


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_the_same_texts_come_from_anywhere(server: FlakyServer, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = server.folder / name
    fsspec.filesystem("memory").pipe_file(f"/bucket/{name}", path.read_bytes())
    server.faults[name] = [status(503), drop, drop]
    for url in (path, f"pipe:cat '{path}'", f"{server.url}/{name}", f"memory://bucket/{name}", path.as_uri()):
        assert is_raw_source(f"wds:{url}")
        (found,) = find_inputs([f"wds:{url}"])
        reading = Reading("text")
        assert [document.text for document in found.read(reading) if isinstance(document, Document)] == TEXTS
        assert reading.meter.bytes == path.stat().st_size
    assert server.count(name) == 4, "a host that fails for a while is asked again"
    monkeypatch.chdir(server.folder)
    assert texts(f"wds:pipe:cat a.tar #{300 * '.'}") == TEXTS, "longer than any file's name"


WHOLE: dict[str, bytes] = {
    "gz": gzip.compress(tar(*SIX)),
    "bz2": bz2.compress(tar(*SIX)),
    "xz": lzma.compress(tar(*SIX)),
    "zst": zstandard.compress(tar(*SIX)),
    "one after another": tar(*SIX[:4]) + tar(*SIX[4:]),
    "gzipped one after another": gzip.compress(tar(*SIX[:4])) + gzip.compress(tar(*SIX[4:])),
}


@pytest.mark.parametrize("case", WHOLE)
def test_tars_of_many_kinds(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.tar").write_bytes(WHOLE[case])
    assert texts(f"wds:{tmp_path}/a.tar") == TEXTS
    assert ("2 tars one after another; all are read" in caplog.text) == ("one after another" in case)


def lies_in_the_end(data: bytes) -> bytes:
    return data[: 6 * EACH + 1024] + b"x" * 512 + data[6 * EACH + 1536 :]


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "on a member's edge": (lambda data: data[: 3 * EACH], "ends at byte 3072"),
    "in a header": (lambda data: data[: 3 * EACH + 100], ""),
    "in the data": (lambda data: data[: 3 * EACH + 700], ""),
    "within the padding of the last": (lambda data: data[: 6 * EACH - 100], ""),
    "without its end": (lambda data: data[: 6 * EACH], "head -c 1024 /dev/zero >> TAR"),
    "a zeroed header": (lambda data: data[: 2 * EACH] + bytes(512) + data[2 * EACH + 512 :], ""),
    "a hole of zeros": (lambda data: data[:EACH] + bytes(2048) + data[3 * EACH :], "a header after 4 blocks of zeros"),
    "a broken header": (lambda data: data[: 2 * EACH + 148] + b"\xff" * 8 + data[2 * EACH + 156 :], "byte 2048"),
    "junk in its end": (lies_in_the_end, "found neither"),
    "empty": (lambda data: b"", "it is empty"),
    "no tar": (lambda data: b"plain text" * 100, ""),
    "a zip": (lambda data: b"PK\x03\x04" + bytes(2000), "it is a zip file"),
    "cut gzip": (lambda data: gzip.compress(data)[:-30], ""),
    "gzip without its sum": (lambda data: gzip.compress(data)[:-8], ""),
    "gzip of zeros": (lambda data: gzip.compress(data)[:3] + bytes(300), ""),
    "gzip and junk": (lambda data: gzip.compress(data)[:200] + b"\xff" * 50, ""),
    "cut xz": (lambda data: lzma.compress(data)[:-30], ""),
    "cut bzip2": (lambda data: bz2.compress(data)[:-9], ""),
    "cut zstd": (lambda data: zstandard.compress(data)[:-1], ""),
    "whole zstd of a cut tar": (lambda data: zstandard.compress(data[: 3 * EACH]), "ends at byte 3072"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("url", ["{path}", "pipe:cat '{path}'"])
def test_a_tar_that_is_cut_or_overwritten_is_never_taken_for_a_short_one(tmp_path: Path, case: str, url: str) -> None:
    damage, told = BROKEN[case]
    path = tmp_path / "a.tar"
    path.write_bytes(damage(tar(*SIX)))
    with pytest.raises(ValueError, match=r"wds:.*a\.tar.*the tar is broken or cut short") as error:
        texts(f"wds:{url.format(path=path)}")
    assert told in str(error.value)
    if case == "without its end":
        subprocess.run(["bash", "-c", f"head -c 1024 /dev/zero >> {path}"], check=True)
        assert texts(f"wds:{path}") == TEXTS


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_members_that_are_read_and_those_that_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.tar"
    long = f"{'long/' * 60}a.txt"  # a name that takes a header of its own
    members = (
        (long, b"text"),
        ("b.json", b'{"id": "named",\n "text": "more"}'),
        ("._a.txt", b"\0\5\x16\7"),
        ("__MACOSX/x/._b.txt", b"junk"),
        link("c.txt", "a.txt", tarfile.SYMTYPE),
        link("d.txt", "a.txt", tarfile.LNKTYPE),
        link("folder", "", tarfile.DIRTYPE),
        ("e.parquet", b"PAR1"),
        ("f.x.cls", b"3"),
        ("g", b"4"),
    )
    path.write_bytes(tar(*members))
    assert read_documents_of(path) == [Document(long, "text"), Document("named", "more")]
    assert "left out: 2 of macOS's own (._NAME, __MACOSX), 2 links, 1 .parquet, 1 .cls, 1 without" in caplog.text
    assert "(what a link points to" in caplog.text
    path.write_bytes(tar(("a.png", b"1"), ("b.png", b"2")))
    with pytest.raises(ValueError, match=r"expected members that end in .txt, .*, found 2 .png"):
        read_documents_of(path)
    path.write_bytes(tar())
    assert read_documents_of(path) == []


def read_documents_of(path: Path, skip: int = 0) -> list[Document | BadDocument]:
    (found,) = find_inputs([f"wds:{path}"])
    return list(found.read(Reading("text", skip)))


def test_a_bad_member_does_not_cost_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    bad = ("a.txt", b"\xff\xfea\0b\0"), ("b.jsonl", b'{"text": "b"}\n{\n'), ("c.json", b"[1"), ("d.txt.gz", b"x")
    path.write_bytes(tar(*bad, ("e.json", b'{"body": 1}'), ("f.txt", b"e")))
    found = read_documents_of(path)
    names = ["a.txt", "b.jsonl:1", "b.jsonl:2", "c.json:1", "c.json", "d.txt.gz", "e.json", "f.txt"]
    assert [document.id for document in found] == names
    assert [document.id for document in found if isinstance(document, Document)] == ["b.jsonl:1", "f.txt"]
    assert "member e.json: expected the field 'text', found 'body'" in getattr(found[6], "reason", "")
    for skip in range(9):
        assert read_documents_of(path, skip) == found[skip:]


def test_tars_that_are_not_to_be_had(server: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    path, url = server.folder / "a.tar", f"{server.url}/a.tar"
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    monkeypatch.setattr(remote, "READ_SECONDS", 0.2)
    cases: tuple[tuple[str, type[Exception], str], ...] = (
        (f"{server.folder}/t{{1..2}}.tar", FileNotFoundError, r"t1\.tar: no such file"),
        (f"{server.folder}/t{{1..2.tar", ValueError, r"braces are not balanced"),
        (f"pipe:cat '{path}'; exit 7", ConnectionError, "expected a tar, found .*the command ended with exit code 7"),
        (f"pipe:head -c 512 '{path}'; sleep 60", ConnectionError, r"gave no byte for 0\.2 s, after 512 bytes"),
        (f"{server.url}/b.tar", FileNotFoundError, r"wds:http.*/b\.tar: expected a tar, found nothing \(not found"),
        ("s3://bucket/a.tar", ValueError, r"s3://bucket/a\.tar: its protocol needs a package: pip install s3fs"),
    )
    for source, kind, told in cases:
        with pytest.raises(kind, match=told):
            texts(f"wds:{source}")
    for fault in (status(503), drop):
        server.always["a.tar"] = fault
        with pytest.raises(ConnectionError, match=r"/a\.tar: expected a tar, found .*, after \d+ bytes; check the URL"):
            texts(f"wds:{url}")
    server.always.clear()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote, "write_all", full)
    before = server.count("a.tar")
    told = r"a\.tar: expected room .*No space left on device after 0 bytes.* TMPDIR"
    with pytest.raises(ValueError, match=told) as error:
        texts(f"wds:{url}")
    assert server.count("a.tar") == before + 1 and re.search(told, str(error.value))
