"""Several sets in one stream: proportions, epochs of each, the same for any world; and shards that are out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_shards import make_manifest, write_blocks

from revpatch.shards.format import Manifest, ShardError, ShardFault
from revpatch.shards.mixture import Lanes, Mixture
from revpatch.shards.quarantine import Quarantine
from revpatch.shards.replay import ReplayMixture
from revpatch.shards.shard_set import Corpus, ShardSet

WORLDS = [1, 2, 3, 4, 6, 8]


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[Manifest], Mixture]:
    manifests = draw(
        st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4).map(make_manifest), min_size=1, max_size=4)
    )
    weights = [draw(st.sampled_from([1.0, 2.0, 0.5, 0.3333, 7.0])) for _ in manifests]
    most = sum(m.blocks for m in manifests) if len(manifests) > 1 else manifests[0].blocks
    lanes, shuffle = draw(st.integers(1, min(24, most))), draw(st.sampled_from([1, 4, 10**6]))
    return manifests, Mixture(manifests, weights, lanes, draw(st.integers(0, 2**40)), shuffle, repeat=True)


@settings(max_examples=100, deadline=None)
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


@settings(max_examples=100, deadline=None)
@given(drawn=mixtures(), data=st.data())
def test_the_global_batch_is_the_same_for_every_world(
    drawn: tuple[list[Manifest], Mixture], data: st.DataObject
) -> None:
    _, mixture = drawn
    step = data.draw(st.integers(0, 10**6))
    whole = mixture.block_ids(step)
    for world in (w for w in WORLDS if mixture.lanes % w == 0):
        share = mixture.lanes // world
        parts = [mixture.block_ids(step, rank * share, (rank + 1) * share) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_one_set_is_its_lanes() -> None:
    manifest = make_manifest([13, 40])
    mixture, lanes = Mixture([manifest], [3.0], 7, 5, 8, True), Lanes(manifest, 7, 5, 8, True)
    for step in range(40):
        np.testing.assert_array_equal(mixture.block_ids(step), lanes.block_ids(step))
        assert mixture.epochs(step) == [lanes.epoch_of(step)]


@pytest.mark.parametrize(("weights", "within"), [([2, 1], 1), ([0.7, 0.2, 0.1], 1), ([1, 3.14159, 2.71828], 1)])
def test_proportions_hold_from_the_first_step_on(weights: list[float], within: float) -> None:
    manifests = [make_manifest([5000]) for _ in weights]
    mixture = Mixture(manifests, weights, 10, 0, 64, repeat=True)
    shares = np.array(weights) / np.sum(weights)
    ids = np.concatenate([mixture.block_ids(step) for step in range(300)])
    for drawn in (10, 100, 1000, 3000):
        counts = np.bincount(ids[:drawn] // 5000, minlength=len(weights))
        assert np.abs(counts - drawn * shares).max() <= within + 1e-4 * drawn


def test_without_repeat_it_ends_before_a_set_would_begin_anew() -> None:
    mixture = Mixture([make_manifest([30]), make_manifest([1000])], [1, 2], 6, 0, 8, repeat=False)
    assert mixture.total_steps == 15
    ids = np.concatenate([mixture.block_ids(step) for step in range(15)])
    assert len(set(ids.tolist())) == 90 and (ids < 30).sum() == 30
    with pytest.raises(IndexError):
        mixture.block_ids(15)


def test_a_weight_that_would_draw_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="less than one draw in 10000"):
        Mixture([make_manifest([5]), make_manifest([5])], [1e-7, 1.0], 2, 0, 8, True)


def test_a_corpus_numbers_the_blocks_of_its_sets_one_after_the_other(tmp_path: Path) -> None:
    blocks = np.arange(48).reshape(12, 4)
    write_blocks(tmp_path / "a", blocks[:5], 2)
    write_blocks(tmp_path / "b", blocks[5:], 3)
    corpus = Corpus([ShardSet(tmp_path / "a"), ShardSet(tmp_path / "b")])
    order = np.array([11, 0, 5, 4, 4])
    np.testing.assert_array_equal(corpus.read(order), blocks[order])
    with pytest.raises(IndexError):
        corpus.read(np.array([12]))
    write_blocks(tmp_path / "c", np.arange(10).reshape(2, 5), 3)
    with pytest.raises(ValueError, match=r"differ in block_size: 4 in .*a, 5 in .*c"):
        Corpus([ShardSet(tmp_path / "a"), ShardSet(tmp_path / "c")])


def out(manifest: Manifest, shard: int, step: int) -> ShardFault:
    return ShardFault(manifest.digest, shard, f"shard-{shard}", "it is torn", step)


@settings(max_examples=60, deadline=None)
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
            share = lanes // world
            parts = [slice(rank * share, (rank + 1) * share) for rank in range(world)]
            each = [quarantine.replace(manifest, ids[part], step, lane[part]) for part in parts]
            np.testing.assert_array_equal(np.concatenate(each), read)


def test_a_set_with_no_shard_left_is_an_error() -> None:
    manifest = make_manifest([3, 4])
    quarantine = Quarantine(0)
    assert quarantine.add(out(manifest, 0, 0)) and quarantine.add(out(manifest, 1, 2))
    assert not quarantine.add(out(manifest, 1, 3)), "it is out already"
    assert quarantine.replace(manifest, np.array([1]), 1, np.array([0]))[0] >= 3
    with pytest.raises(ShardError, match=r"every one of the 2 shards .* shard-1: it is torn"):
        quarantine.replace(manifest, np.array([1]), 2, np.array([0]))


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
