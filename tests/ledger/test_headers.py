"""What a file says of itself, read without torch: the same as with it, and never by running what is in it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from past_run import metadata, tensors

from revpatch.ledger.entry import EntryError, read_entry, write_entry
from revpatch.ledger.headers import read_metadata


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_it_is_what_the_whole_file_says(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"entry{suffix}"
    told = metadata("good", 5, odd='a "header" in words', header="header")
    sha256 = write_entry(path, tensors(1), told)
    assert read_metadata(path, sha256) == read_metadata(path) == read_entry(path)[1] == told
    with pytest.raises(EntryError, match="has not been opened"):
        read_metadata(path, "0" * 64)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_damaged_or_foreign_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"entry{suffix}"
    write_entry(path, tensors(1), metadata("good", 5))
    data = path.read_bytes()
    for damaged in (b"", data[:7], data[: len(data) // 2], b"\xff" * 200):
        path.write_bytes(damaged)
        with pytest.raises(EntryError, match=r"damaged|not a revpatch entry") as caught:
            read_metadata(path)
        assert str(path) in str(caught.value)
    with pytest.raises(EntryError, match="can't be read"):
        read_metadata(tmp_path / f"none{suffix}")


def test_code_is_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save({"header": Evil(trace), "tensors": {}}, path)
    with pytest.raises(EntryError):
        read_metadata(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"tensors": Evil(trace), "header": "{}"}))
    with pytest.raises(EntryError):
        read_metadata(path)
    assert not trace.exists()


@pytest.mark.parametrize("command", [["log"], ["log", "--json"], ["verify"], ["prune", "--keep", "1"]])
def test_log_verify_and_prune_do_without_torch(tmp_path: Path, command: list[str]) -> None:
    from past_run import a_trained_run

    a_trained_run(tmp_path)
    (tmp_path / "snapshot").mkdir()
    write_entry(tmp_path / "snapshot/step000000000020.pt", tensors(1), {"events": 0, "head": "", "entry": "x"})
    code = (
        "import sys; from revpatch.cli import app; sys.argv[0] = 'revpatch'; app(standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'pyarrow'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "ledger", command[0], str(tmp_path), *command[1:]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
