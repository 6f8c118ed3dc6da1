"""Batches are read ahead: in order, no further than asked, and no longer than until they are closed."""

from __future__ import annotations

import itertools
import threading

import pytest
from waiting import until

from revpatch.shards.format import ShardError
from revpatch.train.batches import Prefetcher


def test_batches_come_in_order_and_no_further_ahead_than_asked_and_an_error_at_its_step() -> None:
    before, fetched = threading.active_count(), []

    def fetch(step: int) -> int:
        fetched.append(step)
        if step == 30:
            raise ShardError("broken")
        return step * step

    with pytest.raises(KeyError), Prefetcher(fetch, itertools.count(10), depth=3) as batches:
        assert next(batches) == 100
        until(lambda: len(fetched) == 5, "one taken, three waiting, one in hand")
        assert [next(batches) for _ in range(19)] == [step * step for step in range(11, 30)]
        for _ in range(2):
            with pytest.raises(ShardError, match="broken"):
                next(batches)
        assert fetched[-1] == 30
        raise KeyError
    assert threading.active_count() == before
    with Prefetcher(fetched.append, itertools.count(), depth=1) as batches:
        next(batches)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
