"""Progress of a measurement on standard error: what is being done, how far it is, and what is left.

    progress = Progress("bench.py", [*names, *(name for _ in range(rounds) for name in names)])
    for _ in range(rounds):
        for name in names:
            with progress.step(name):
                ...

A line a step, so that a pipe and a log file show it too. What is left is estimated from the steps of the same kind that
are done; a kind that has not been done yet counts as much as the mean step so far. Imports no torch, as figures.py.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator


class Progress:
    """The steps of one tool.

    Args:
        tool: its name, before each line.
        steps: the kind of every step that is to come, in any order.
        clock: seconds; tests give their own.
    """

    def __init__(self, tool: str, steps: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.tool, self.clock, self.began = tool, clock, clock()
        self.waiting = Counter(steps)
        self.total, self.done = self.waiting.total(), 0
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """Announces a step and times it."""
        self.say(kind)
        began = self.clock()
        yield
        self.waiting[kind] -= 1
        self.done += 1
        self.seconds[kind].append(self.clock() - began)
        if self.done == self.total:
            print(f"{self.tool}: done after {clock_time(self.clock() - self.began)}", file=sys.stderr, flush=True)

    def say(self, what: str) -> None:
        """Prints a line: the step that begins, the time so far and an estimate of what is left."""
        so_far, left = clock_time(self.clock() - self.began), self.left()
        estimate = "" if left is None else f", about {clock_time(left)} left"
        print(f"{self.tool}: {self.done + 1} of {self.total}, {what}; {so_far}{estimate}", file=sys.stderr, flush=True)

    def left(self) -> float | None:
        """Return an estimate of the seconds that are left; None before the first step is done."""
        measured = [value for values in self.seconds.values() for value in values]
        if not measured:
            return None
        mean = statistics.mean(measured)
        means = {kind: statistics.mean(values) for kind, values in self.seconds.items() if values}
        return sum(count * means.get(kind, mean) for kind, count in self.waiting.items() if count > 0)


def clock_time(seconds: float) -> str:
    """Return "1:05" for 65 seconds, "1:02:05" for an hour more."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
