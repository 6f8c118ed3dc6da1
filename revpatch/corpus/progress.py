"""How far a build of shards is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.progress import BarColumn, Progress, TextColumn

from revpatch.terminal import console, say


@dataclass(frozen=True)
class BuildProgress:
    """How far a build is: documents read, tokens and blocks written, on both sides of the holdout.

    `bytes_read` counts what was taken of those inputs whose size is known; these have `bytes_in_all`, None for none.
    `tokens_in_all` is about where `max_tokens` ends it, if it does.
    """

    documents: int
    tokens: int
    blocks: int
    bytes_read: int
    bytes_in_all: int | None
    tokens_in_all: int | None = None


SECONDS_BETWEEN_LINES = 30.0


class BuildSpeed:
    """Tokens a second since the first progress that was seen, so that what an earlier call did does not count."""

    def __init__(self) -> None:
        self._first: tuple[float, int, int] | None = None

    def describe(self, progress: BuildProgress) -> str:
        """Return one line: what is done, how fast, and how long it will take."""
        now = time.monotonic()
        first = self._first = self._first or (now, progress.tokens, progress.bytes_read)
        seconds = max(now - first[0], 1e-9)
        speed = (progress.tokens - first[1]) / seconds
        text = f"{progress.documents:,} documents, {progress.tokens:,} tokens, {speed:,.0f} tokens/s"
        if progress.bytes_in_all:
            text += f", {progress.bytes_read / 2**20:,.0f} of {progress.bytes_in_all / 2**20:,.0f} MiB"
        if (left := _seconds_left(progress, first, seconds)) is not None:
            text += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        return text


@contextmanager
def shown_progress() -> Iterator[Callable[[BuildProgress], None]]:
    """Gives what `build_shards` calls with its progress: a bar on a terminal, else a line now and then."""
    speed = BuildSpeed()
    if not console.is_terminal:
        last = time.monotonic()

        def line(progress: BuildProgress) -> None:
            nonlocal last
            text = speed.describe(progress)
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                say(text)

        yield line
        return
    with Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def update(progress: BuildProgress) -> None:
            bar.update(
                task, description=speed.describe(progress), total=progress.bytes_in_all, completed=progress.bytes_read
            )

        yield update


def _seconds_left(progress: BuildProgress, first: tuple[float, int, int], seconds: float) -> int | None:
    """By the end that comes first; None if there is none to be seen."""
    ends = [(progress.tokens, first[1], progress.tokens_in_all), (progress.bytes_read, first[2], progress.bytes_in_all)]
    left = [max(0, end - now) * seconds / (now - then) for now, then, end in ends if end is not None and now > then]
    return int(min(left)) if left else None
