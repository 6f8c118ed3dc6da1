"""What `shards verify` finds: every broken shard, whatever is broken in it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from damage import STRIDE, flip

from revpatch.stream.manifest import Manifest
from revpatch.stream.shard_set import ShardSet, sample_blocks, verify_shards


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
