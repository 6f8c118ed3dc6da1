"""Reading blocks of a set, and shards that are broken: named before a block of them is handed out."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import DAMAGES, STRIDE, damage, flip
from remote_set import second
from toy_shards import write_blocks

from revpatch.shards.format import HEADER_BYTES, Manifest, ShardError
from revpatch.shards.shard_set import ShardSet, sample_blocks, verify_shards


def test_blocks_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    blocks = np.random.default_rng(0).integers(0, 2**16, size=(53, 6))
    write_blocks(tmp_path / "set", blocks, blocks_per_shard=10)
    ids = np.array([52, 0, 9, 10, 11, 52, 30])
    with ShardSet(tmp_path / "set") as shards:
        read = shards.read(ids)
        assert read.dtype == np.int64
        np.testing.assert_array_equal(read, blocks[ids])
        assert shards.read(np.array([], dtype=np.int64)).shape == (0, 6)
        for wrong in (-1, 53):
            with pytest.raises(IndexError, match="0 to 52"):
                shards.read(np.array([0, wrong]))
        shards.close()
        np.testing.assert_array_equal(shards.read(ids), blocks[ids])


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revpatch.shards.cache.OPEN_FILES", 3)
    blocks = np.arange(80).reshape(20, 4)
    write_blocks(tmp_path / "set", blocks, blocks_per_shard=1)
    open_before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    with ShardSet(tmp_path / "set") as shards:
        ids = np.random.default_rng(0).integers(0, 20, size=200)
        np.testing.assert_array_equal(shards.read(ids), blocks[ids])
        if open_before:
            assert len(list(Path("/proc/self/fd").iterdir())) <= open_before + 3


def test_a_shard_that_was_swapped_since_it_was_hashed_is_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("revpatch.shards.cache.OPEN_FILES", 1)
    manifest = write_blocks(tmp_path / "set", np.arange(8).reshape(2, 4), blocks_per_shard=1)
    path = tmp_path / "set" / manifest.shards[0].name
    with ShardSet(tmp_path / "set") as shards:
        shards.read(np.array([0, 1]))  # the first is closed again
        path.with_name("other").write_bytes(flip(path.read_bytes(), HEADER_BYTES))
        path.with_name("other").replace(path)
        with pytest.raises(ShardError, match=f"{path.name}.*expected sha256"):
            shards.read(np.array([0]))


def test_a_set_may_move_and_bear_any_name(built: Path, tmp_path: Path) -> None:
    with ShardSet(built) as shards:
        expected = shards.read(np.arange(len(shards)))
    with ShardSet(shutil.move(built, tmp_path / "a #1 100% 😀")) as shards:
        np.testing.assert_array_equal(shards.read(np.arange(len(shards))), expected)


# Shards that are broken.


@pytest.mark.parametrize("how", [*DAMAGES, "swapped", "missing"])
def test_a_damaged_shard_is_named_before_a_block_of_it_is_handed_out(built: Path, how: str) -> None:
    path = second(built)
    damage(path, how)
    for use in (lambda s: s.read(np.array([25])), lambda s: s.verify()):
        with pytest.raises(ShardError, match=rf"{path.name}: shard 1 of \d+: expected .* found .*; copy this file"):
            use(ShardSet(built))


def test_a_shard_of_another_size_is_refused_when_the_sizes_are_checked(built: Path) -> None:
    damage(second(built), "cut on a member boundary")
    with pytest.raises(ShardError, match=rf"{second(built).name}.*expected \d+ bytes, found 3072"):
        ShardSet(built).check_sizes()
    second(built).unlink()
    with pytest.raises(ShardError, match=rf"{second(built).name}: shard 1 of \d+: expected a file, found nothing"):
        ShardSet(built).check_sizes()


def test_the_shards_that_are_whole_can_still_be_read(built: Path) -> None:
    damage(second(built), "a flipped bit in a block")
    with ShardSet(built) as shards:
        assert shards.read(np.arange(20)).shape == (20, 16)
        with pytest.raises(ShardError):
            shards.read(np.arange(19, 21))


def test_a_shard_that_changes_while_it_is_open_is_hashed_again(built: Path) -> None:
    path = second(built)
    whole = path.read_bytes()
    with ShardSet(built) as shards:
        shards.read(np.array([20]))
        with path.open("r+b") as file:
            file.write(flip(whole, HEADER_BYTES))
        with pytest.raises(ShardError, match=rf"{path.name}.*expected sha256"):
            shards.read(np.array([21]))
    with ShardSet(built) as shards:
        path.write_bytes(whole)
        shards.read(np.array([20]))
        os.truncate(path, len(whole) // 2)
        with pytest.raises(ShardError, match=rf"expected {len(whole)} bytes, found {len(whole) // 2}"):
            shards.read(np.array([21]))
        assert shards.read(np.array([0])).shape == (1, 16)


# What `shards verify` and `shards show` find.


def faults_of(directory: Path) -> dict[str, str]:
    return {report.path.name: "; ".join(report.faults) for report in verify_shards(directory) if report.faults}


def test_a_sound_set_has_no_fault_and_is_read_whole(built: Path) -> None:
    read: list[int] = []
    reports = list(verify_shards(built, read.append))
    assert [report.shard for report in reports] == list(Manifest.read(built).shards)
    assert not faults_of(built)
    assert sum(read) == sum(report.shard.bytes for report in reports)


def test_every_broken_shard_is_named_with_what_is_wrong(built: Path) -> None:
    shards = Manifest.read(built).shards
    paths = [built / shard.name for shard in shards]
    data = [path.read_bytes() for path in paths]
    paths[0].write_bytes(flip(data[0], 520 + STRIDE))
    paths[1].write_bytes(data[1][: 5 * STRIDE])
    paths[2].unlink()
    assert faults_of(built) == {
        paths[0].name: f"expected sha256 {shards[0].sha256}, found {hashlib.sha256(paths[0].read_bytes()).hexdigest()}",
        paths[1].name: f"expected {len(data[1])} bytes, found 5120; expected sha256 {shards[1].sha256}, found "
        f"{hashlib.sha256(paths[1].read_bytes()).hexdigest()}",
        paths[2].name: "it can't be read: No such file or directory",
    }
    paths[0].write_bytes(data[1])
    paths[1].write_bytes(data[0])
    paths[2].write_bytes(data[2])
    assert faults_of(built).keys() == {paths[0].name, paths[1].name}, "two that were swapped"


def test_samples_are_blocks_of_the_set(built: Path) -> None:
    ids, blocks = sample_blocks(built, 4)
    with ShardSet(built) as shards:
        np.testing.assert_array_equal(blocks, shards.read(ids))
        assert (len(ids), ids[0], ids[-1]) == (4, 0, len(shards) - 1)
