"""The order of blocks: exact, elastic, shuffled."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_shards import make_manifest

from revpatch.shards.mixture import Lanes, hash64, permute

WORLDS = [1, 2, 3, 4, 6, 8]


@st.composite
def streams(draw: st.DrawFn) -> Lanes:
    shard_blocks = draw(st.lists(st.integers(1, 40), min_size=1, max_size=7))
    lanes = draw(st.integers(1, min(24, sum(shard_blocks))))
    shuffle_blocks = draw(st.sampled_from([1, 2, 7, 16, 10**6]))
    return Lanes(make_manifest(shard_blocks), lanes, draw(st.integers(0, 2**40)), shuffle_blocks, repeat=True)


@settings(max_examples=150, deadline=None)
@given(stream=streams())
def test_every_block_of_an_epoch_is_used_once_and_what_is_left_over_comes_first_in_the_next(stream: Lanes) -> None:
    everything = set(range(stream.blocks))
    left_over: list[int] = []
    step = 0
    for epoch in range(4):
        assert stream.first_step(epoch) == step
        batches = [stream.block_ids(step + k) for k in range(stream.steps_per_epoch(epoch))]
        step += len(batches)
        assert all(batch.shape == (stream.lanes,) for batch in batches)
        assert stream.carried(epoch) == len(left_over) < stream.lanes
        assert sorted(batches[0][: len(left_over)].tolist()) == sorted(left_over)
        used = Counter(np.concatenate(batches).tolist())
        used.subtract(left_over)
        assert set(used.values()) <= {0, 1}, "a block was used twice"
        left_over = sorted(everything - {block for block, n in used.items() if n})
    assert step == 4 * stream.blocks // stream.lanes


@settings(max_examples=150, deadline=None)
@given(stream=streams(), data=st.data())
def test_the_global_batch_is_the_same_for_every_world(stream: Lanes, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 5 * stream.blocks // stream.lanes + 10))
    whole = stream.block_ids(step)
    epoch = stream.epoch_of(step)
    assert len(set(whole.tolist())) == stream.lanes or (epoch > 0 and step == stream.first_step(epoch))
    for world in (w for w in WORLDS if stream.lanes % w == 0):
        share = stream.lanes // world
        parts = [stream.block_ids(step, rank * share, (rank + 1) * share) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@settings(max_examples=60, deadline=None)
@given(stream=streams())
def test_without_repeat_all_ranks_end_at_the_same_step(stream: Lanes) -> None:
    once = Lanes(make_manifest([stream.blocks]), stream.lanes, stream.seed, 8, repeat=False)
    assert once.total_steps == stream.blocks // stream.lanes
    for world in (w for w in WORLDS if stream.lanes % w == 0):
        share = stream.lanes // world
        for rank in range(world):
            assert len(once.block_ids(once.total_steps - 1, rank * share, (rank + 1) * share)) == share
            with pytest.raises(IndexError, match=f"step {once.total_steps} is outside"):
                once.block_ids(once.total_steps, rank * share, (rank + 1) * share)
    with pytest.raises(IndexError):
        once.block_ids(-1)
    with pytest.raises(IndexError):
        stream.block_ids(-1)
    assert stream.total_steps is None


def test_one_shard_feeds_many_ranks() -> None:
    stream = Lanes(make_manifest([100]), 8, seed=0, shuffle_blocks=16, repeat=False)
    seen = np.concatenate([stream.block_ids(k, rank, rank + 1) for k in range(12) for rank in range(8)])
    assert len(set(seen.tolist())) == 96


def test_each_lane_walks_a_part_of_its_own() -> None:
    """Without shuffling within windows a lane reads on from where it was, so that it needs one shard at a time."""
    stream = Lanes(make_manifest([1000]), 10, seed=0, shuffle_blocks=1, repeat=True)
    lanes = np.stack([stream.block_ids(k) for k in range(100)], axis=1)
    np.testing.assert_array_equal(lanes, np.arange(1000).reshape(10, 100))


def test_shards_are_shuffled_and_blocks_within_their_window() -> None:
    stream = Lanes(make_manifest([100] * 20), 1, seed=3, shuffle_blocks=100, repeat=True)
    order = np.concatenate([stream.block_ids(k) for k in range(2000)])
    shards = order.reshape(20, 100) // 100
    assert (shards == shards[:, :1]).all(), "a window of one shard's length holds one shard"
    assert shards[:, 0].tolist() != sorted(shards[:, 0].tolist())
    assert not any((np.diff(window) == 1).sum() > 10 for window in order.reshape(20, 100))
    again = np.concatenate([stream.block_ids(k) for k in range(2000, 4000)])
    assert (order == again).mean() < 0.02, "each epoch has its own order"
    other = Lanes(make_manifest([100] * 20), 1, seed=4, shuffle_blocks=100, repeat=True)
    assert (order == np.concatenate([other.block_ids(k) for k in range(2000)])).mean() < 0.02


def test_a_batch_is_spread_over_a_sorted_corpus_as_a_full_permutation_would_spread_it() -> None:
    blocks, lanes = 40_000, 32
    stream = Lanes(make_manifest([2000] * 20), lanes, seed=1, shuffle_blocks=4000, repeat=False)
    spread = np.mean([stream.block_ids(k).std() for k in range(0, blocks // lanes, 10)])
    shuffled = np.random.default_rng(0).permutation(blocks).reshape(-1, lanes)
    assert spread > 0.95 * shuffled.std(axis=1).mean()


def test_a_lookup_costs_the_same_at_any_step_and_holds_no_list_of_the_corpus() -> None:
    stream = Lanes(make_manifest([10**9] * 50), 64, seed=0, shuffle_blocks=10**8, repeat=True)
    started = time.perf_counter()
    for step in (0, 10**6, 10**12, 10**15):
        assert len(set(stream.block_ids(step).tolist())) == 64
    assert time.perf_counter() - started < 0.5


def test_the_order_is_pinned() -> None:
    """What a run trained on is told from (seed, step) as long as the run is kept. Raise ORDER_VERSION with it."""
    stream = Lanes(make_manifest([30, 20, 50]), 8, seed=1234, shuffle_blocks=32, repeat=True)
    assert stream.block_ids(0).tolist() == [3, 20, 1, 48, 36, 55, 72, 97]
    assert stream.block_ids(12).tolist() == [95, 87, 89, 99, 25, 81, 86, 36]
    assert stream.block_ids(10**6).tolist() == [15, 21, 5, 63, 58, 78, 89, 32]


def test_what_the_caller_does_to_a_batch_changes_no_other() -> None:
    stream = Lanes(make_manifest([30]), 4, seed=0, shuffle_blocks=8, repeat=True)
    expected = stream.block_ids(2).tolist()
    stream.block_ids(2)[:] = -1
    assert stream.block_ids(2).tolist() == expected


def test_impossible_lanes() -> None:
    with pytest.raises(ValueError, match="hold 5 blocks and there are 6 lanes"):
        Lanes(make_manifest([2, 3]), 6, 0, 8, True)
    with pytest.raises(ValueError, match="lanes is 0"):
        Lanes(make_manifest([5]), 0, 0, 8, True)
    with pytest.raises(ValueError, match="shuffle_blocks is 0"):
        Lanes(make_manifest([5]), 1, 0, 0, True)
    with pytest.raises(ValueError, match="lanes 2 to 6 were asked for; there are 5"):
        Lanes(make_manifest([5]), 5, 0, 8, True).block_ids(0, 2, 6)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    result = permute(np.arange(size), np.array(size), np.array(key, dtype=np.uint64))
    np.testing.assert_array_equal(np.sort(result), np.arange(size))


@pytest.mark.parametrize("size", [2, 3, 5, 7, 8, 24])
def test_permute_sends_an_index_anywhere_alike(size: int) -> None:
    keys = hash64(99, np.arange(20_000 * size))
    for index in (0, size - 1):
        landed = np.bincount(permute(np.full(len(keys), index), np.array(size), keys), minlength=size)
        chi_square = float(((landed - 20_000) ** 2 / 20_000).sum())
        assert chi_square < size + 4 * np.sqrt(2 * size) + 4, landed  # mean size - 1, deviation sqrt(2(size - 1))
