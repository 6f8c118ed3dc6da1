"""Raw tars from anywhere, gzipped or not: the same texts, errors that say what failed, and memory that doesn't grow."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from flaky_server import FlakyServer, drop, status

from revpatch.corpus.chunks import ChunkReading, Position, read_chunks
from revpatch.corpus.documents import Reading
from revpatch.corpus.sources import find_inputs, is_raw_source, read_documents
from revpatch.shards import remote

TEXTS = [f"text {i} é" for i in range(40)]


def tar_of(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for i, text in enumerate(texts):
            info = tarfile.TarInfo(f"{i:05}.txt")
            info.size = len(text.encode())
            file.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FlakyServer]:
    (tmp_path / "a.tar").write_bytes(tar_of(TEXTS))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_of(TEXTS)))
    flaky = FlakyServer(tmp_path)
    yield flaky
    flaky.close()


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_the_same_texts_come_from_anywhere(server: FlakyServer, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = server.folder / name
    fsspec.filesystem("memory").pipe_file(f"/bucket/{name}", path.read_bytes())
    for url in (path, f"pipe:cat '{path}'", f"{server.url}/{name}", f"memory://bucket/{name}", path.as_uri()):
        spec = f"wds:{url}"
        assert is_raw_source(spec)
        (found,) = find_inputs([spec])
        reading = Reading("text")
        assert [document.text for document in found.read(reading)] == TEXTS  # type: ignore[union-attr]
        assert reading.meter.bytes == path.stat().st_size
    monkeypatch.chdir(server.folder)
    for command in ("zcat a.tar.gz", f"cat a.tar #{300 * '.'}"):  # the second is longer than any file's name
        assert [document.text for document in read_documents([f"wds:pipe:{command}"])] == TEXTS


def test_a_gzipped_tar_that_is_broken_is_called_so(server: FlakyServer) -> None:
    path = server.folder / "a.tar.gz"
    whole = path.read_bytes()
    for data in (whole[:-30], whole[:3] + b"\0" * 300, b"\x1f\x8b\xff" + whole[3:], whole[:200] + b"\xff" * 50):
        path.write_bytes(data)
        for url in (path, f"pipe:cat {path}", f"{server.url}/a.tar.gz"):
            with pytest.raises(ValueError, match=r"a\.tar\.gz: the tar is broken or cut short"):
                list(read_documents([f"wds:{url}"]))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_host_that_fails_for_a_while_is_asked_again(
    server: FlakyServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    texts = [np.random.default_rng(i).bytes(60_000).hex() for i in range(60)]
    data = tar_of(texts)
    (server.folder / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    server.faults[name] = [status(503), drop, drop]
    assert [document.text for document in read_documents([f"wds:{server.url}/{name}"])] == texts
    assert server.count(name) == 4


def test_a_full_disk_is_said(server: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote, "write_all", full)
    with pytest.raises(ValueError, match=r"a\.tar: expected room .*No space left on device after 0 bytes.* TMPDIR"):
        list(read_documents([f"wds:{server.url}/a.tar"]))
    assert server.count("a.tar") == 1


def test_what_the_host_does_not_give_is_said(server: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    with pytest.raises(
        FileNotFoundError, match=r"wds:http.*/b\.tar: expected a tar, found nothing \(not found, as HTTP"
    ):
        list(read_documents([f"wds:{server.url}/b.tar"]))
    for fault in (status(503), drop):
        server.always["a.tar"] = fault
        with pytest.raises(ConnectionError, match=r"/a\.tar: expected a tar, found .*, after \d+ bytes; check the URL"):
            list(read_documents([f"wds:{server.url}/a.tar"]))
    with pytest.raises(ValueError, match=r"s3://bucket/a\.tar: its protocol needs a package: pip install s3fs"):
        monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
        list(read_documents(["wds:s3://bucket/a.tar"]))
    monkeypatch.setattr(remote, "READ_SECONDS", 0.2)
    with pytest.raises(ConnectionError, match=r"gave no byte for 0\.2 s, after 512 bytes"):
        list(read_documents([f"wds:pipe:head -c 512 '{server.folder}/a.tar'; sleep 60"]))


def test_the_members_of_a_tar_are_let_go_of(tmp_path: Path) -> None:
    def peak(members: int) -> int:
        (tmp_path / "a.tar").write_bytes(tar_of(["text"] * members))
        (found,) = find_inputs([f"wds:{tmp_path}/a.tar"])
        tracemalloc.start()
        assert sum(1 for _ in found.read(Reading("text"))) == members
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)  # what is imported and compiled at the first time
    assert peak(1200) < 1.2 * peak(300)


def test_a_row_group_of_parquet_is_not_held_whole(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        generator = np.random.default_rng(0)
        texts = [generator.bytes(5000).hex() for _ in range(rows)]
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", data_page_size=2**16, use_dictionary=False)
        del texts, table
        (found,) = find_inputs([tmp_path / "a.parquet"])
        before = pyarrow.total_allocated_bytes()
        return max(pyarrow.total_allocated_bytes() - before for _ in found.read(Reading("text")))

    assert peak(3000) < 1.2 * peak(1500)


def test_the_bytes_read_grow_with_each_piece_of_a_long_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_text("one word after another " * 100_000)
    inputs = find_inputs([tmp_path / "a.txt", tmp_path / "b.txt"])
    # A tokenizer that may be cut anywhere.
    reading = ChunkReading("text", (), 0.0, skip_bad=False, verify=False, encode=lambda text: list(text.encode()))
    read = [chunk.bytes_read for chunk in read_chunks(inputs, reading, Position())]
    assert read == sorted(read) and len(set(read)) > 6
    assert read[0] == 5 and read[-1] == sum(path.stat().st_size for path in tmp_path.glob("*.txt"))
