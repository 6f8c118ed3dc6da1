"""Where the time of a step goes, without making the host wait for a GPU.

On a GPU a part is the time between two events in its stream, read when the means over steps are taken; on a CPU it is
the time on the clock. Parts nest, and what an inner one took is not counted in the outer one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Clock:
    """Sums the seconds of named parts.

    Args:
        device: on which the parts run.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._events: list[tuple[str, str | None, Any, Any]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what is done inside."""
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        start = self._mark()
        try:
            yield
        finally:
            self._open.pop()
            if self._on_gpu:
                self._events.append((name, outer, start, self._mark()))
            else:
                self._add(name, outer, time.perf_counter() - start)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as a part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call; waits for the GPU to be done with them."""
        for name, outer, start, end in self._events:
            end.synchronize()
            self._add(name, outer, start.elapsed_time(end) / 1e3)
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # type: ignore[no-untyped-call]
        return event

    def _add(self, name: str, outer: str | None, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if outer is not None:
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds
