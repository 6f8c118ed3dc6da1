"""Entry files that are damaged, foreign or unsafe: nothing believed, nothing run that is code."""

import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from an_entry import METADATA, a_patch

from revpatch.ledger.entry import FORMAT, VERSION, EntryError, read_entry, tensors_digest, write_entry
from revpatch.ledger.folder import read_folder
from revpatch.ledger.headers import read_metadata


class Evil:
    """Leaves a file behind when it is unpickled by anything that runs code."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_flipped_bit_is_seen_with_the_sha256(tmp_path, suffix):
    path = tmp_path / f"entry{suffix}"
    sha256 = write_entry(path, a_patch(), METADATA)
    data = path.read_bytes()
    for position in range(0, len(data), 97):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(EntryError, match=f"expected sha256 {sha256}, found") as caught:
            read_entry(path, sha256)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_flipped_bit_never_changes_anything_unseen_without_the_sha256(tmp_path, suffix):
    path = tmp_path / f"entry{suffix}"
    write_entry(path, a_patch(), METADATA)
    digest, data = tensors_digest(a_patch()), path.read_bytes()
    refused = 0
    for position in range(0, len(data), 11):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            tensors, metadata = read_entry(path)
            assert (tensors_digest(tensors), metadata) == (digest, METADATA)
        except EntryError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("depth", [600, 100_000])
@pytest.mark.parametrize("where", [".pt", ".safetensors", "header of .safetensors", "folder"])
def test_what_is_nested_deeper_than_python_can_read(tmp_path, where, depth):
    """Some is too deep for the parser, and some only for what hashes it."""
    deep = "[" * depth + "]" * depth
    header = json.dumps({"format": FORMAT, "version": VERSION, "content_sha256": "0", "metadata": {}})
    header = header.replace('"metadata": {}', f'"metadata": {{"a": {deep}}}')
    path = tmp_path / "entry.pt"
    if where == ".pt":
        torch.save({"header": header, "tensors": {}}, path)
    elif where == "folder":
        path = tmp_path / "patch_config.json"
        path.write_text(deep)
    else:
        path = tmp_path / "entry.safetensors"
        path.write_bytes(safetensors.torch.save(a_patch(), metadata={"revpatch": header}))
        if where.startswith("header"):
            path.write_bytes(len(deep).to_bytes(8, "little") + deep.encode())
            with pytest.raises(EntryError, match=r"truncated or damaged"):
                read_metadata(path)
    with pytest.raises(EntryError, match=r"truncated or damaged|not a revpatch entry|is no JSON|not a folder|damaged"):
        read_folder(tmp_path) if where == "folder" else read_entry(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated(tmp_path, suffix):
    path = tmp_path / f"entry{suffix}"
    sha256 = write_entry(path, a_patch(), METADATA)
    data = path.read_bytes()
    for length in (0, 3, 7, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(EntryError, match="is not the file that was recorded"):
            read_entry(path, sha256)
        with pytest.raises(EntryError, match=r"truncated or damaged|not a revpatch entry") as caught:
            read_entry(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("how", ["in torch.save", "bare pickle", "as the header", "in a legacy file"])
def test_code_is_refused_and_not_run(tmp_path, how):
    path, trace = tmp_path / "000_a_commit.pt", tmp_path / "trace"
    if how == "bare pickle":
        path.write_bytes(pickle.dumps({"header": "{}", "tensors": Evil(trace)}))
    elif how == "as the header":
        torch.save({"header": Evil(trace), "tensors": {}}, path)
    else:
        torch.save(
            {"header": "{}", "tensors": {"w": Evil(trace)}}, path, _use_new_zipfile_serialization=how == "in torch.save"
        )
    with pytest.raises(EntryError, match=r"Nothing (was executed|in it was run)") as caught:
        read_entry(path)
    assert str(path) in str(caught.value)
    assert not trace.exists()
    torch.load(path, weights_only=False) if how != "bare pickle" else pickle.loads(path.read_bytes())  # noqa: S301
    assert trace.exists(), "the file would have run its code in other hands"


def test_the_sha256_is_checked_before_the_file_is_opened(tmp_path, monkeypatch):
    path = tmp_path / "entry.pt"
    write_entry(path, a_patch(), METADATA)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled before it was verified"))
    with pytest.raises(EntryError, match="has not been opened"):
        read_entry(path, "0" * 64)


@pytest.mark.parametrize(
    "payload",
    [
        [1, 2],
        {"state_dict": {"w": torch.zeros(2)}},
        {"header": 5, "tensors": {}},
        {"header": "{}", "tensors": {}},
        {"header": '{"format": "revpatch-entry", "version": 1}', "tensors": {}},
        {"header": '{"format": "revpatch-entry", "version": 1}', "tensors": [torch.zeros(2)]},
        {"header": '{"format":"revpatch-entry","version":1,"metadata":{},"content_sha256":""}', "tensors": {"w": 1}},
    ],
)
def test_another_programs_file_is_no_entry(tmp_path, payload):
    path = tmp_path / "model.pt"
    torch.save(payload, path)
    with pytest.raises(EntryError, match="is not a revpatch entry"):
        read_entry(path)


def test_other_strangers(tmp_path):
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("model.safetensors", "text.pt", "text.safetensors", "missing.pt"):
        with pytest.raises(EntryError, match=r"not a revpatch entry|no safetensors file|can't be read"):
            read_entry(tmp_path / name)


def test_a_newer_format_asks_for_a_newer_revpatch(tmp_path):
    path = tmp_path / "entry.pt"
    torch.save({"header": '{"format": "revpatch-entry", "version": 2}', "tensors": {}}, path)
    with pytest.raises(EntryError, match="format version 2, and this revpatch reads version 1"):
        read_entry(path)
