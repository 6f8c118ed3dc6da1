"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def wait_until(found: Callable[[], Found], within: float, otherwise: Callable[[], str], every: float = 0.05) -> Found:
    """What `found` returns once it is true; after so many seconds fails with the words of `otherwise`."""
    end = time.monotonic() + within
    while not (value := found()):
        assert time.monotonic() < end, f"not within {within} s: {otherwise()}"
        time.sleep(every)
    return value
