"""Reading ahead: in order, no further than asked, and over when it is closed."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from revpatch.shards.format import ShardError
from revpatch.train.batches import Prefetcher


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
