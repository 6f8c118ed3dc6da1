"""Reading ahead: in order, no further than asked, settled once, and over when it is closed."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from revpatch.stream.prefetch import Prefetcher
from revpatch.stream.tars import ShardError


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
