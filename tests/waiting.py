"""Waiting for what another process or thread does, and not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def until(condition: Callable[[], Found], what: str | Callable[[], str] = "it", timeout: float = 60) -> Found:
    """What the condition gives once that is true; fails after `timeout` seconds, with the words of `what`."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what if isinstance(what, str) else what()}"
        time.sleep(0.02)
    return found
