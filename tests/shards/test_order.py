"""The order of blocks: exact, elastic, shuffled; several sets in one stream; and what is read instead of bad shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_shards import make_manifest, write_blocks

from revpatch.shards.format import Manifest, ShardError, ShardFault
from revpatch.shards.mixture import Lanes, Mixture, hash64, permute
from revpatch.shards.quarantine import Quarantine
from revpatch.shards.replay import ReplayMixture
from revpatch.shards.shard_set import Corpus, ShardSet

WORLDS = [1, 2, 3, 4, 6, 8]


@st.composite
def streams(draw: st.DrawFn) -> Lanes:
    shard_blocks = draw(st.lists(st.integers(1, 40), min_size=1, max_size=7))
    lanes = draw(st.integers(1, min(24, sum(shard_blocks))))
    shuffle_blocks = draw(st.sampled_from([1, 2, 7, 16, 10**6]))
    return Lanes(make_manifest(shard_blocks), lanes, draw(st.integers(0, 2**40)), shuffle_blocks, repeat=True)


@settings(max_examples=60)
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


def test_the_order_is_pinned() -> None:
    """What a run trained on follows from (seed, step) as long as the run is kept. Raise ORDER_VERSION with it."""
    stream = Lanes(make_manifest([30, 20, 50]), 8, seed=1234, shuffle_blocks=32, repeat=True)
    assert stream.block_ids(0).tolist() == [3, 20, 1, 48, 36, 55, 72, 97]
    assert stream.block_ids(12).tolist() == [95, 87, 89, 99, 25, 81, 86, 36]
    stream.block_ids(10**6)[:] = -1  # what the caller does to a batch changes no other
    assert stream.block_ids(10**6).tolist() == [15, 21, 5, 63, 58, 78, 89, 32]


def test_impossible_lanes_and_weights() -> None:
    with pytest.raises(ValueError, match="hold 5 blocks and there are 6 lanes"):
        Lanes(make_manifest([2, 3]), 6, 0, 8, True)
    with pytest.raises(ValueError, match="lanes 2 to 6 were asked for; there are 5"):
        Lanes(make_manifest([5]), 5, 0, 8, True).block_ids(0, 2, 6)
    with pytest.raises(ValueError, match="less than one draw in 10000"):
        Mixture([make_manifest([5]), make_manifest([5])], [1e-7, 1.0], 2, 0, 8, True)


@settings(max_examples=60)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    result = permute(np.arange(size), np.array(size), np.array(key, dtype=np.uint64))
    np.testing.assert_array_equal(np.sort(result), np.arange(size))


@pytest.mark.parametrize("size", [3, 8, 24])
def test_permute_sends_an_index_anywhere_alike(size: int) -> None:
    keys = hash64(99, np.arange(20_000 * size))
    for index in (0, size - 1):
        landed = np.bincount(permute(np.full(len(keys), index), np.array(size), keys), minlength=size)
        chi_square = float(((landed - 20_000) ** 2 / 20_000).sum())
        assert chi_square < size + 4 * np.sqrt(2 * size) + 4, landed  # mean size - 1, deviation sqrt(2(size - 1))


# Several sets.


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[Manifest], Mixture]:
    manifests = draw(
        st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4).map(make_manifest), min_size=1, max_size=4)
    )
    weights = [draw(st.sampled_from([1.0, 2.0, 0.5, 0.3333, 7.0])) for _ in manifests]
    most = sum(m.blocks for m in manifests) if len(manifests) > 1 else manifests[0].blocks
    lanes, shuffle = draw(st.integers(1, min(24, most))), draw(st.sampled_from([1, 4, 10**6]))
    return manifests, Mixture(manifests, weights, lanes, draw(st.integers(0, 2**40)), shuffle, repeat=True)


@settings(max_examples=40)
@given(drawn=mixtures())
def test_every_set_goes_through_its_own_epochs(drawn: tuple[list[Manifest], Mixture]) -> None:
    manifests, mixture = drawn
    starts = np.cumsum([0] + [m.blocks for m in manifests])
    steps = 3 * int(starts[-1]) // mixture.lanes + 3
    ids = np.concatenate([mixture.block_ids(step) for step in range(steps)])
    for index, manifest in enumerate(manifests):
        mine = ids[(ids >= starts[index]) & (ids < starts[index + 1])] - starts[index]
        lanes = mixture.parts[index].lanes
        whole = mixture.parts[index].first_step(1) * lanes  # what is left over comes first in the next epoch
        assert max(Counter(mine[:whole].tolist()).values(), default=1) == 1
        if len(mine) >= 2 * manifest.blocks:
            counts = Counter(mine[: mixture.parts[index].first_step(2) * lanes].tolist())
            assert set(counts.values()) <= {1, 2} and len(counts) == manifest.blocks


@settings(max_examples=80)
@given(drawn=mixtures(), step=st.integers(0, 10**6))
def test_the_global_batch_is_the_same_for_every_world(drawn: tuple[list[Manifest], Mixture], step: int) -> None:
    manifests, mixture = drawn
    whole = mixture.block_ids(step)
    for world in (w for w in WORLDS if mixture.lanes % w == 0):
        share = mixture.lanes // world
        parts = [mixture.block_ids(step, rank * share, (rank + 1) * share) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    if len(manifests) == 1:
        lanes = mixture.parts[0]
        np.testing.assert_array_equal(lanes.block_ids(step), whole)
        assert mixture.epochs(step) == [lanes.epoch_of(step)]


def test_without_repeat_it_ends_at_one_step_before_a_set_would_begin_anew() -> None:
    mixture = Mixture([make_manifest([30]), make_manifest([1000])], [1, 2], 6, 0, 8, repeat=False)
    assert mixture.total_steps == 15
    ids = np.concatenate([mixture.block_ids(step) for step in range(15)])
    assert len(set(ids.tolist())) == 90 and (ids < 30).sum() == 30
    with pytest.raises(IndexError, match="step 15"):
        mixture.block_ids(15)


@pytest.mark.parametrize("weights", [[2, 1], [1, 3.14159, 2.71828]])
def test_proportions_hold_from_the_first_step_on(weights: list[float]) -> None:
    mixture = Mixture([make_manifest([5000]) for _ in weights], weights, 10, 0, 64, repeat=True)
    shares = np.array(weights) / np.sum(weights)
    ids = np.concatenate([mixture.block_ids(step) for step in range(300)])
    for drawn in (10, 100, 1000, 3000):
        counts = np.bincount(ids[:drawn] // 5000, minlength=len(weights))
        assert np.abs(counts - drawn * shares).max() <= 1 + 1e-4 * drawn


def test_a_corpus_numbers_the_blocks_of_its_sets_one_after_the_other(tmp_path: Path) -> None:
    blocks = np.arange(48).reshape(12, 4)
    write_blocks(tmp_path / "a", blocks[:5], 2)
    write_blocks(tmp_path / "b", blocks[5:], 3)
    corpus = Corpus([ShardSet(tmp_path / "a"), ShardSet(tmp_path / "b")])
    order = np.array([11, 0, 5, 4, 4])
    np.testing.assert_array_equal(corpus.read(order), blocks[order])
    with pytest.raises(IndexError):
        corpus.read(np.array([12]))


# Shards that are out.


def out(manifest: Manifest, shard: int, step: int) -> ShardFault:
    return ShardFault(manifest.digest, shard, f"shard-{shard}", "it is torn", step)


@settings(max_examples=40)
@given(shard_blocks=st.lists(st.integers(1, 20), min_size=2, max_size=5), data=st.data())
def test_what_is_read_instead_of_a_shard_that_is_out(shard_blocks: list[int], data: st.DataObject) -> None:
    manifest = make_manifest(shard_blocks)
    lanes = data.draw(st.integers(1, min(12, manifest.blocks)))
    bad = data.draw(st.integers(0, len(shard_blocks) - 1))
    stream = Lanes(manifest, lanes, 3, 8, repeat=True)
    quarantine = Quarantine(3, [out(manifest, bad, 5)])
    first = sum(shard_blocks[:bad])
    for step in range(12):
        ids, lane = stream.block_ids(step), np.arange(lanes)
        read = quarantine.replace(manifest, ids, step, lane)
        was_bad = (ids >= first) & (ids < first + shard_blocks[bad])
        if step < 5:
            np.testing.assert_array_equal(read, ids)
            continue
        np.testing.assert_array_equal(read[~was_bad], ids[~was_bad])
        assert not ((read >= first) & (read < first + shard_blocks[bad])).any()
        assert ((read >= 0) & (read < manifest.blocks)).all()
        for world in (w for w in WORLDS if lanes % w == 0):
            halves = zip(np.split(ids, world), np.split(lane, world), strict=True)
            each = [quarantine.replace(manifest, part, step, at) for part, at in halves]
            np.testing.assert_array_equal(np.concatenate(each), read)


def test_replay_reads_around_a_shard_that_is_out(tmp_path: Path) -> None:
    manifest = write_blocks(tmp_path / "a", np.arange(80).reshape(20, 4), 5)
    shards = ShardSet(tmp_path / "a")
    (tmp_path / "a" / manifest.shards[1].name).write_bytes(b"")
    replay, quarantine = ReplayMixture([shards], 8, 0), Quarantine(0, [out(manifest, 1, 0)])
    for step in range(10):
        tokens, keys = replay.read(step, quarantine=quarantine)
        assert not any(5 <= block < 10 for _, block in keys)
        np.testing.assert_array_equal(tokens[:, 0] // 4, [block for _, block in keys])
    with pytest.raises(ShardError):
        for step in range(10):
            replay.read(step)
    assert quarantine.add(out(manifest, 0, 0)) and not quarantine.add(out(manifest, 0, 3)), "it is out already"
    assert quarantine.add(out(manifest, 2, 0)) and quarantine.add(out(manifest, 3, 2))
    with pytest.raises(ShardError, match=r"every one of the 4 shards .* shard-\d: it is torn"):
        quarantine.replace(manifest, np.array([1]), 2, np.array([0]))
