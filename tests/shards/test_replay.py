"""The sample that is replayed: uniform, the same for every world, and a function of (seed, lane, step)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_shards import write_blocks

from revpatch.shards.format import Manifest
from revpatch.shards.replay import ReplayMixture, block_priority, bottom_k, write_replay
from revpatch.shards.shard_set import Corpus, ShardSet

IDS = st.lists(st.integers(0, 500), max_size=60)


def ids(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@settings(max_examples=40)
@given(values=IDS, k=st.integers(0, 30), seed=st.integers(0, 2**32))
def test_the_k_of_smallest_priority_each_once(values: list[int], k: int, seed: int) -> None:
    by_priority = sorted(set(values), key=lambda i: int(block_priority(seed, ids([i]))[0]))
    sample = bottom_k(seed, ids(values), k)
    assert sample.dtype == np.int64
    assert sample.tolist() == by_priority[:k]


@settings(max_examples=40)
@given(a=IDS, b=IDS, k=st.integers(1, 20))
def test_the_sample_of_the_parts_samples_is_that_of_the_whole(a: list[int], b: list[int], k: int) -> None:
    parts = np.concatenate([bottom_k(7, ids(part), k) for part in (a, b)])
    assert bottom_k(7, parts, k).tolist() == bottom_k(7, ids(a + b), k).tolist()


def test_the_sample_is_uniform() -> None:
    """Over many seeds each block is kept as often as any other, and so is each pair of neighbours."""
    blocks, k, trials = 100, 20, 3000
    kept = np.zeros((trials, blocks), dtype=bool)
    for seed in range(trials):
        kept[seed, bottom_k(seed, np.arange(blocks), k)] = True
    p = k / blocks
    deviations = (kept.sum(axis=0) - trials * p) / np.sqrt(trials * p * (1 - p))
    # Chi-square of 100 counts: mean about 99, standard deviation about 14.
    assert 57 < (deviations**2).sum() < 155
    assert np.abs(deviations).max() < 4.5
    pair = p * (k - 1) / (blocks - 1)
    together = (kept & np.roll(kept, 1, axis=1)).sum(axis=0)
    assert np.abs((together - trials * pair) / np.sqrt(trials * pair)).max() < 4.5


def test_priorities_do_not_collide_and_are_pinned() -> None:
    assert len(np.unique(block_priority(3, np.arange(200_000)))) == 200_000
    assert block_priority(0, ids([0, 1, 10**12])).tolist() == [
        71079956591447702,
        3784090540856616149,
        1932737199300318329,
    ]
    assert bottom_k(42, np.arange(1000), 5).tolist() == [329, 812, 681, 405, 113]


@pytest.fixture
def source(tmp_path: Path) -> ShardSet:
    write_blocks(tmp_path / "source", np.arange(50 * 8).reshape(50, 8), blocks_per_shard=7)
    return ShardSet(tmp_path / "source")


def test_a_replay_set_holds_the_blocks_and_is_a_set_like_any_other(source: ShardSet, tmp_path: Path) -> None:
    write_blocks(tmp_path / "more", 1000 + np.arange(16).reshape(2, 8), blocks_per_shard=7)
    corpus = Corpus([source, ShardSet(tmp_path / "more")])
    manifest = write_replay(corpus, ids([51, 3, 17, 3]), tmp_path / "replay", "000_wiki")
    folder = tmp_path / "replay" / "000_wiki"
    assert sorted(path.name for path in folder.iterdir()) == ["000_wiki-000000.tar", "manifest.json"]
    assert Manifest.read(folder) == manifest
    assert (manifest.split, manifest.blocks, manifest.tokenizer) == ("replay", 3, source.manifest.tokenizer)
    assert manifest.sources == ("some.txt", "some.txt") and source.manifest.digest in str(manifest.note)
    with ShardSet(folder) as replay:
        np.testing.assert_array_equal(replay.read(np.arange(3)), corpus.read(ids([3, 17, 51])))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert write_replay(corpus, ids([3, 17, 51]), tmp_path / "replay", "000_wiki") == manifest
    with pytest.raises(FileExistsError, match="differs in"):
        write_replay(corpus, ids([1, 3]), tmp_path / "replay", "000_wiki")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture
def sets(tmp_path: Path) -> list[ShardSet]:
    """Three sets, of sizes that their number divides; a block's first token tells its set, the second its number."""
    opened = []
    for i, blocks in enumerate((6, 42, 201)):
        rows = np.stack([np.full(blocks, i), np.arange(blocks), np.zeros(blocks), np.zeros(blocks)], axis=1)
        write_blocks(tmp_path / f"set{i}", rows.astype(np.int64), blocks_per_shard=30)
        opened.append(ShardSet(tmp_path / f"set{i}"))
    return opened


def test_a_replay_block_is_a_function_of_seed_lane_and_step(sets: list[ShardSet]) -> None:
    mixture = ReplayMixture(sets, 24, seed=9)
    for step in (0, 1, 10**9):
        which, block_ids = mixture.locate(step)
        assert (which.dtype, block_ids.dtype, which.shape, block_ids.shape) == (np.int64, np.int64, (24,), (24,))
        for world in (1, 2, 3, 4, 6, 8):
            share = 24 // world
            parts = [ReplayMixture(sets, 24, seed=9).locate(step, r * share, (r + 1) * share) for r in range(world)]
            np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), which)
            np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), block_ids)
    assert mixture.locate(0)[1].tolist() != mixture.locate(1)[1].tolist()
    assert mixture.locate(0)[1].tolist() != ReplayMixture(sets, 24, seed=10).locate(0)[1].tolist()


def test_every_set_has_an_equal_share_and_every_block_of_it_too(sets: list[ShardSet]) -> None:
    mixture = ReplayMixture(sets, 20, seed=1)
    drawn = [mixture.locate(step) for step in range(3000)]
    which = np.concatenate([d[0] for d in drawn])
    block_ids = np.concatenate([d[1] for d in drawn])
    assert np.abs(np.bincount(which) / 60_000 - 1 / 3).max() < 0.01
    for i, shard_set in enumerate(sets):
        counts = np.bincount(block_ids[which == i], minlength=len(shard_set))
        expected = counts.sum() / len(shard_set)
        assert ((counts - expected) ** 2 / expected).sum() < len(shard_set) + 4 * np.sqrt(2 * len(shard_set)) + 4


def test_sets_that_do_not_go_together(sets: list[ShardSet], tmp_path: Path) -> None:
    write_blocks(tmp_path / "wide", np.zeros((3, 6), dtype=np.int64), blocks_per_shard=5)
    with pytest.raises(ValueError, match=r"differ in block_size: 4 in .*set0, 6 in .*wide"):
        ReplayMixture([sets[0], ShardSet(tmp_path / "wide")], 2, seed=0)
    manifest = write_blocks(tmp_path / "foreign", np.zeros((3, 4), dtype=np.int64), blocks_per_shard=5)
    replace(manifest, tokenizer=replace(manifest.tokenizer, fingerprint="1" * 64)).write(tmp_path / "foreign")
    with pytest.raises(ValueError, match="differ in tokenizer"):
        Corpus([sets[0], ShardSet(tmp_path / "foreign")])
