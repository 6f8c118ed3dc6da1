"""What `shards verify` finds: every broken shard, whatever is broken in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damage import STRIDE, flip

from revpatch.stream.inspection import sample_blocks, verify_shards
from revpatch.stream.manifest import Manifest
from revpatch.stream.shard_set import ShardSet


def faults_of(directory: Path) -> dict[str, str]:
    return {report.path.name: "; ".join(report.faults) for report in verify_shards(directory) if report.faults}


def test_a_sound_set_has_no_fault_and_is_read_whole(built: Path) -> None:
    read: list[int] = []
    reports = list(verify_shards(built, read.append))
    assert [report.shard for report in reports] == list(Manifest.read(built).shards)
    assert not faults_of(built)
    assert sum(read) == sum(report.shard.bytes for report in reports)


Change = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: flip(data, 700), ["sha256"]),
        (lambda data: flip(data, 2 * STRIDE), ["at byte 2048 expected member 0000000000", "sha256"]),
        (lambda data: flip(data, len(data) - 1), ["expected the tar's end, found more", "sha256"]),
        (lambda data: data[: 5 * STRIDE], ["bytes, found 5120", "the tar has no end", "sha256"]),
        (lambda data: data[:-512], ["bytes, found", "sha256"]),
        (lambda data: data + bytes(512), ["bytes, found", "sha256"]),
        (lambda data: b"", ["found 0", "the tar has no end"]),
    ],
)
def test_every_broken_shard_is_named_with_what_is_wrong(built: Path, change: Change, told: list[str]) -> None:
    shards = Manifest.read(built).shards
    for shard in (shards[0], shards[2]):
        path = built / shard.name
        path.write_bytes(change(path.read_bytes()))
    faults = faults_of(built)
    assert faults.keys() == {shards[0].name, shards[2].name}
    assert all(words in fault for fault in faults.values() for words in told)


def test_a_missing_shard_and_two_that_were_swapped(built: Path) -> None:
    names = [shard.name for shard in Manifest.read(built).shards]
    first, second = built / names[0], built / names[1]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    (built / names[2]).unlink()
    faults = faults_of(built)
    assert "at byte 0 expected member 000000000000.bin" in faults[names[0]]
    assert "No such file" in faults[names[2]]
    assert faults.keys() == set(names[:3])


def test_samples_are_blocks_of_the_set(built: Path) -> None:
    ids, blocks = sample_blocks(built, 4)
    with ShardSet(built) as shards:
        np.testing.assert_array_equal(blocks, shards.read(ids))
        assert (len(ids), ids[0], ids[-1]) == (4, 0, len(shards) - 1)
