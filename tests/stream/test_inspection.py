"""What `shards verify` finds: every broken shard, whatever is broken in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from damage import STRIDE, flip

from revpatch.stream.inspection import sample_blocks, verify_shards
from revpatch.stream.manifest import Manifest
from revpatch.stream.shard_set import ShardSet
from revpatch.stream.tars import ShardError


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
        (lambda data: flip(data, 520 + STRIDE), ["sha256", "at offset 1024 differs from what was built"]),
        (lambda data: flip(data, 2 * STRIDE), ["no header of member 0000000000", "at offset 2048", "sha256"]),
        (lambda data: flip(data, 20 * STRIDE + 3), ["its end is not zeros alone from offset 20483 on", "sha256"]),
        (lambda data: data[: 5 * STRIDE], ["bytes, found 5120", "it ends at byte 5120, before", "sha256"]),
        (lambda data: data[:-512], ["bytes, found", "sha256"]),
        (lambda data: data + bytes(512), ["bytes, found", "sha256"]),
        (lambda data: b"", ["found 0", "it ends at byte 0"]),
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


def test_a_manifest_that_lists_sound_shards_in_another_order(built: Path) -> None:
    manifest = Manifest.read(built)
    first, second, *rest = manifest.shards
    replace(manifest, shards=(second, first, *rest)).write(built)
    faults = faults_of(built)
    assert faults.keys() == {first.name, second.name}
    assert "member '000000000020.bin' instead of 000000000000.bin at offset 0" in faults[second.name]


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda path, other: path.unlink(), "this set has no checksums of its blocks"),
        (lambda path, other: path.write_bytes(flip(path.read_bytes(), 5)), "damaged, or of another"),
        (lambda path, other: path.write_bytes(path.read_bytes()[:-4]), "expected 84 bytes, found 80"),
        (lambda path, other: path.write_bytes(other.read_bytes()), "damaged, or of another shard"),
    ],
    ids=["none", "a flipped bit", "cut", "of another shard"],
)
def test_without_checksums_of_its_own_a_flipped_bit_is_found_and_no_place_is_made_up(
    built: Path, harm: Callable[[Path, Path], object], told: str
) -> None:
    first, second, *_ = (built / shard.name for shard in Manifest.read(built).shards)
    harm(first.with_suffix(".crc32"), second.with_suffix(".crc32"))
    assert not faults_of(built), "the shards themselves are sound"
    first.write_bytes(flip(first.read_bytes(), 520))
    assert told in faults_of(built)[first.name]
    with ShardSet(built) as shards, pytest.raises(ShardError, match=f"the offset is unknown: .*{told}") as caught:
        shards.verify()
    assert caught.value.offset is None


def test_a_missing_shard_and_two_that_were_swapped(built: Path) -> None:
    names = [shard.name for shard in Manifest.read(built).shards]
    first, second = built / names[0], built / names[1]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    (built / names[2]).unlink()
    faults = faults_of(built)
    assert "member '000000000020.bin' instead of 000000000000.bin at offset 0" in faults[names[0]]
    assert "No such file" in faults[names[2]]
    assert faults.keys() == set(names[:3])


def test_samples_are_blocks_of_the_set(built: Path) -> None:
    ids, blocks = sample_blocks(built, 4)
    with ShardSet(built) as shards:
        np.testing.assert_array_equal(blocks, shards.read(ids))
        assert (len(ids), ids[0], ids[-1]) == (4, 0, len(shards) - 1)
