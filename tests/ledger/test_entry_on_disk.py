"""Entry files on the disk: never overwritten, whole or not there."""

import errno
import os
import resource
import subprocess
import sys

import pytest
from an_entry import METADATA, a_patch

from revpatch.durable import sha256_of
from revpatch.ledger.entry import EntryError, write_entry


def test_an_entry_is_never_overwritten(tmp_path):
    path = tmp_path / "000_a_start.pt"
    sha256 = write_entry(path, a_patch(), METADATA)
    assert write_entry(path, a_patch(), METADATA) == sha256
    with pytest.raises(EntryError, match=f"exists with other content: sha256 {sha256}"):
        write_entry(path, a_patch(), {**METADATA, "step": 501})
    assert sha256_of(path.read_bytes()) == sha256
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_nothing_behind_and_the_rest_untouched(tmp_path):
    write_entry(tmp_path / "000_a_start.pt", a_patch(), METADATA)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    code = (
        "import sys, torch; from pathlib import Path; from revpatch.ledger.entry import write_entry\n"
        "try: write_entry(Path(sys.argv[1]), {'w': torch.zeros(100_000)}, {})\n"
        "except OSError as error: print(error.filename); sys.exit(7)"
    )
    path = tmp_path / "000_a_commit.pt"
    process = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert (process.returncode, process.stdout.strip()) == (7, str(path)), process.stderr
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_entry_has_its_name_only_once_it_is_on_the_disk(tmp_path, monkeypatch):
    def failing(_):
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="the disk is broken"):
        write_entry(tmp_path / "000_a_start.pt", a_patch(), METADATA)
    assert list(tmp_path.iterdir()) == []
