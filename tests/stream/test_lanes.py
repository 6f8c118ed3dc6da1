"""The order of blocks: exact, elastic, shuffled; reading them; reading them ahead; and shards that are broken."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_shards import make_manifest, write_blocks

from revpatch.stream.lanes import Lanes
from revpatch.stream.manifest import Manifest
from revpatch.stream.permutation import hash64, permute
from revpatch.stream.prefetch import Prefetcher
from revpatch.stream.shard_set import ShardSet
from revpatch.stream.tars import HEADER_BYTES, ShardError, stride_of

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


# Reading.


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
    monkeypatch.setattr("revpatch.stream.local_files._OPEN_FILES", 3)
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
    monkeypatch.setattr("revpatch.stream.local_files._OPEN_FILES", 1)
    manifest = write_blocks(tmp_path / "set", np.arange(8).reshape(2, 4), blocks_per_shard=1)
    path = tmp_path / "set" / manifest.shards[0].name
    with ShardSet(tmp_path / "set") as shards:
        shards.read(np.array([0, 1]))  # the first is closed again
        data = bytearray(path.read_bytes())
        data[HEADER_BYTES] ^= 1
        path.with_name("other").write_bytes(data)
        path.with_name("other").replace(path)
        with pytest.raises(ShardError, match=f"{path.name}.*expected sha256"):
            shards.read(np.array([0]))


def test_a_set_may_move_and_bear_any_name(built: Path, tmp_path: Path) -> None:
    with ShardSet(built) as shards:
        expected = shards.read(np.arange(len(shards)))
    with ShardSet(shutil.move(built, tmp_path / "a #1 100% 😀")) as shards:
        np.testing.assert_array_equal(shards.read(np.arange(len(shards))), expected)


# Shards that are broken. webdataset itself takes most of these for the end of the tar.


def damaged(built: Path, damage: Callable[[bytes, int], bytes]) -> str:
    """Damage the second shard, at its fourth member; returns its name."""
    manifest = Manifest.read(built)
    path = built / manifest.shards[1].name
    path.write_bytes(damage(path.read_bytes(), 3 * stride_of(manifest.block_bytes)))
    return path.name


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes, int], bytes]] = {
    "a flipped bit in a block": lambda data, at: flip(data, at + HEADER_BYTES + 5),
    "a flipped bit in a header": lambda data, at: flip(data, at + 3),
    "a flipped bit in the padding": lambda data, at: flip(data, at + HEADER_BYTES + 100),
    "a zeroed member": lambda data, at: data[:at] + bytes(1024) + data[at + 1024 :],
    "cut inside a member": lambda data, at: data[: at + HEADER_BYTES + 5],
    "cut on a member boundary": lambda data, at: data[:at],
    "cut inside a header": lambda data, at: data[: at + 100],
    "emptied": lambda data, at: b"",
    "longer": lambda data, at: data + bytes(512),
    "two members swapped": lambda data, at: (
        data[:at] + data[at + 1024 : at + 2048] + data[at : at + 1024] + data[at + 2048 :]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_shard_is_named_before_a_block_of_it_is_handed_out(
    built: Path, damage: Callable[[bytes, int], bytes]
) -> None:
    name = damaged(built, damage)
    for use in (lambda s: s.read(np.array([25])), lambda s: s.verify()):
        with pytest.raises(ShardError, match=rf"{name}: shard 1 of \d+: expected .* found .*; copy this file"):
            use(ShardSet(built))


def test_a_shard_of_another_size_is_refused_when_the_sizes_are_checked(built: Path) -> None:
    name = damaged(built, DAMAGES["cut on a member boundary"])
    with pytest.raises(ShardError, match=rf"{name}.*expected \d+ bytes, found 3072"):
        ShardSet(built).check_sizes()


def test_the_shards_that_are_whole_can_still_be_read(built: Path) -> None:
    damaged(built, DAMAGES["a flipped bit in a block"])
    with ShardSet(built) as shards:
        assert shards.read(np.arange(20)).shape == (20, 16)
        with pytest.raises(ShardError):
            shards.read(np.arange(19, 21))


def test_a_missing_and_a_swapped_shard(built: Path) -> None:
    manifest = Manifest.read(built)
    first, second = (built / shard.name for shard in manifest.shards[:2])
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())  # of the same size
    with pytest.raises(ShardError, match=rf"{first.name}.*expected sha256 {manifest.shards[0].sha256}"):
        ShardSet(built).read(np.array([0]))
    first.write_bytes(kept)
    second.unlink()
    with pytest.raises(ShardError, match=rf"{second.name}: shard 1 of \d+: expected a file, found nothing"):
        ShardSet(built).check_sizes()


def test_a_shard_that_changes_while_it_is_read(built: Path) -> None:
    manifest = Manifest.read(built)
    path = built / manifest.shards[0].name
    stride = stride_of(manifest.block_bytes)
    with ShardSet(built) as shards:
        shards.read(np.array([0]))
        with path.open("r+b") as file:
            file.seek(2 * stride)
            file.write(b"else")
        with pytest.raises(ShardError, match=rf"{path.name}.*expected member 000000000002.bin at offset {2 * stride}"):
            shards.read(np.array([2]))
        with path.open("r+b") as file:
            file.truncate(3 * stride + 100)
        with pytest.raises(ShardError, match=r"expected \d+ bytes at offset \d+, found 100"):
            shards.read(np.array([3]))


# Reading ahead.


def test_batches_come_in_order_and_no_further_ahead_than_asked() -> None:
    fetched: list[int] = []

    def fetch(step: int) -> int:
        fetched.append(step)
        return step * step

    with Prefetcher(fetch, range(10, 60), depth=3) as batches:
        assert next(batches) == 100
        time.sleep(0.1)
        assert len(fetched) == 5, "one taken, three waiting, one in hand"
        assert list(batches) == [step * step for step in range(11, 60)]
        assert list(batches) == []


def test_an_error_comes_at_its_step_and_stays() -> None:
    fetched: list[int] = []

    def fetch(step: int) -> int:
        fetched.append(step)
        if step == 3:
            raise ShardError("broken")
        return step

    with Prefetcher(fetch, itertools.count()) as batches:
        assert [next(batches) for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(ShardError, match="broken"):
                next(batches)
    assert fetched == [0, 1, 2, 3]


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_ends_the_thread(taken: int) -> None:
    before = threading.active_count()
    fetched: list[int] = []
    with Prefetcher(fetched.append, range(300), depth=1) as batches:
        for _ in range(taken):
            next(batches)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert len(fetched) <= taken + 3, "it went on to the end instead"
    batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_closing_after_the_caller_failed() -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), Prefetcher(lambda step: step, itertools.count()) as batches:
        next(batches)
        raise KeyError
    assert threading.active_count() == before


def test_no_room_at_all() -> None:
    with pytest.raises(ValueError, match="depth is 0"):
        Prefetcher(lambda step: step, range(3), depth=0)


def test_closing_settles_what_the_fastest_of_several_can_have_settled() -> None:
    """Four readers that meet in every step, closed after the same batch at different speeds: none is left waiting."""
    meeting = threading.Barrier(4)

    def settle(step: int, batch: int) -> int:
        meeting.wait(10)
        return batch

    def reader(pause: float) -> Prefetcher[int]:
        return Prefetcher(lambda step: time.sleep(pause) or step, itertools.count(), depth=1, settle=settle)

    readers = [reader(pause) for pause in (0.0, 0.0, 0.02, 0.05)]
    for _ in range(5):
        assert len({next(each) for each in readers}) == 1
    closing = [threading.Thread(target=each.close) for each in readers]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(5)
    assert not any(thread.is_alive() for thread in closing)
    assert not meeting.broken


def test_a_batch_is_settled_when_there_is_room_and_not_before() -> None:
    settled: list[int] = []

    def settle(step: int, batch: int) -> int:
        settled.append(step)
        return batch

    with Prefetcher(lambda step: step, itertools.count(1), depth=1, settle=settle) as batches:
        for taken in range(1, 6):
            time.sleep(0.05)
            assert settled[-1] <= taken, "one batch waits, and no more is settled"
            assert next(batches) == taken


def test_leaving_by_an_error_does_not_wait_for_a_settling_that_never_ends() -> None:
    stuck = threading.Event()

    def settle(step: int, batch: int) -> int:
        if step == 2:
            stuck.wait(30)
        return batch

    began = time.monotonic()
    with pytest.raises(KeyError), Prefetcher(lambda step: step, itertools.count(1), depth=1, settle=settle) as batches:
        next(batches)
        time.sleep(0.05)
        raise KeyError
    assert time.monotonic() - began < 5
    stuck.set()
