"""Shards on disk: their layout, reading any block, and broken ones: named before a block of them is handed out."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from damage import DAMAGES, STRIDE, damage, flip
from toy_shards import BLOCKS, second, write_blocks

from revpatch.shards.format import HEADER_BYTES, Manifest, ShardError
from revpatch.shards.shard_set import ShardSet, sample_blocks, verify_shards


@pytest.mark.parametrize("size", [2, 255, 256, 300])
def test_members_lie_at_multiples_of_the_stride_and_webdataset_reads_them(tmp_path: Path, size: int) -> None:
    blocks = np.random.default_rng(0).integers(0, 2**16, size=(24, size))
    manifest = write_blocks(tmp_path / "set", blocks, 10)
    stride, number = HEADER_BYTES + -(-2 * size // 512) * 512, 0
    for shard in manifest.shards:
        data = (tmp_path / "set" / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        with tarfile.open(tmp_path / "set" / shard.name) as tar:
            members = tar.getmembers()
        assert len(members) == shard.blocks
        for i, member in enumerate(members):
            assert (member.name, member.offset) == (f"{number:012d}.bin", i * stride)
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname) == ("revpatch", "revpatch")
            number += 1
    paths = [str(tmp_path / "set" / shard.name) for shard in manifest.shards]
    read = [np.frombuffer(sample["bin"], dtype="<u2") for sample in webdataset.WebDataset(paths, shardshuffle=False)]
    np.testing.assert_array_equal(np.stack(read), blocks)
    with ShardSet(tmp_path / "set") as shards:
        np.testing.assert_array_equal(shards.read(np.arange(24)), blocks)


def test_the_bytes_of_a_shard_are_pinned(folder: Path) -> None:
    assert Manifest.read(folder).shards[5].sha256 == "4b42dc69b09eb5c4a1ce38f6c2bfc05123acdf2ecfc433553a42c04ca4cd4d1c"


def test_blocks_are_read_in_the_order_asked_for_from_a_set_of_any_name(folder: Path, tmp_path: Path) -> None:
    ids = np.array([52, 0, 9, 10, 11, 52, 30])
    with ShardSet(shutil.move(folder, tmp_path / "a #1 100% 😀")) as shards:
        read = shards.read(ids)
        assert read.dtype == np.int64
        np.testing.assert_array_equal(read, BLOCKS[ids])
        assert shards.read(np.array([], dtype=np.int64)).shape == (0, 16)
        for wrong in (-1, 60):
            with pytest.raises(IndexError, match="0 to 59"):
                shards.read(np.array([0, wrong]))
        shards.close()
        np.testing.assert_array_equal(shards.read(ids), BLOCKS[ids])
        ids, blocks = sample_blocks(Path(shards.location), 4)
        np.testing.assert_array_equal(blocks, BLOCKS[ids])
        assert (len(ids), ids[0], ids[-1]) == (4, 0, 59)


# Shards that are broken.


@pytest.mark.parametrize("how", [*DAMAGES, "swapped", "missing"])
def test_a_damaged_shard_is_named_before_a_block_of_it_is_handed_out(folder: Path, how: str) -> None:
    path = second(folder)
    damage(path, how)
    for use in (lambda s: s.read(np.array([15])), lambda s: s.verify()):
        with pytest.raises(ShardError, match=rf"{path.name}: shard 1 of \d+: expected .* found .*; copy this file"):
            use(ShardSet(folder))
    with ShardSet(folder) as shards:  # the others can still be read
        np.testing.assert_array_equal(shards.read(np.arange(10)), BLOCKS[:10])
        with pytest.raises(ShardError):
            shards.read(np.arange(9, 12))
        if path.exists() and path.stat().st_size == len(second(folder).with_name("shard-000000.tar").read_bytes()):
            shards.check_sizes()
        else:
            with pytest.raises(ShardError, match=rf"{path.name}: shard 1 of \d+: expected (\d+ bytes|a file), found"):
                shards.check_sizes()


def test_a_shard_that_changes_after_it_was_hashed_is_hashed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("revpatch.shards.cache.OPEN_FILES", 1)
    path = second(folder)
    whole = path.read_bytes()
    with ShardSet(folder) as shards:
        shards.read(np.array([10]))
        with path.open("r+b") as file:
            file.write(flip(whole, HEADER_BYTES))
        with pytest.raises(ShardError, match=rf"{path.name}.*expected sha256"):
            shards.read(np.array([11]))
    path.write_bytes(whole)
    with ShardSet(folder) as shards:
        shards.read(np.array([10, 20]))  # the second is closed again
        path.with_name("other").write_bytes(flip(whole, HEADER_BYTES))
        path.with_name("other").replace(path)
        with pytest.raises(ShardError, match=f"{path.name}.*expected sha256"):
            shards.read(np.array([10]))


def test_every_broken_shard_is_named_with_what_is_wrong(folder: Path) -> None:
    def faults() -> dict[str, str]:
        return {report.path.name: "; ".join(report.faults) for report in verify_shards(folder) if report.faults}

    read: list[int] = []
    reports = list(verify_shards(folder, read.append))
    assert sum(read) == sum(report.shard.bytes for report in reports) and not faults()
    shards = Manifest.read(folder).shards
    paths = [folder / shard.name for shard in shards]
    data = [path.read_bytes() for path in paths]
    paths[0].write_bytes(flip(data[0], 520 + STRIDE))
    paths[1].write_bytes(data[1][: 5 * STRIDE])
    paths[2].unlink()
    assert faults() == {
        paths[0].name: f"expected sha256 {shards[0].sha256}, found {hashlib.sha256(paths[0].read_bytes()).hexdigest()}",
        paths[1].name: f"expected {len(data[1])} bytes, found 5120; expected sha256 {shards[1].sha256}, found "
        f"{hashlib.sha256(paths[1].read_bytes()).hexdigest()}",
        paths[2].name: "it can't be read: No such file or directory",
    }
