"""Batches are read ahead: in order, no further than asked, and no longer than until they are closed."""

from __future__ import annotations

import itertools
import threading

import pytest
from waiting import until

from revpatch.shards.format import ShardError
from revpatch.train.batches import Prefetcher


def test_batches_come_in_order_and_no_further_ahead_than_asked() -> None:
    fetched: list[int] = []

    def fetch(step: int) -> int:
        fetched.append(step)
        return step * step

    with Prefetcher(fetch, range(10, 60), depth=3) as batches:
        assert next(batches) == 100
        until(lambda: len(fetched) == 5, "one taken, three waiting, one in hand")
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


def test_closing_ends_the_thread_before_the_steps_end() -> None:
    before = threading.active_count()
    fetched: list[int] = []
    with pytest.raises(KeyError), Prefetcher(fetched.append, range(300), depth=1) as batches:
        next(batches)
        assert threading.active_count() == before + 1
        raise KeyError
    assert threading.active_count() == before
    assert len(fetched) <= 4
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
