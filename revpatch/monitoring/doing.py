"""What a command is busy with, as plain lines, whenever it has shown nothing for some seconds.

    with doing("loading the base", say) as far:
        ...
        far(120, 640, "blocks")

A command that is quick shows none of it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from revpatch.monitoring.terminal import say_aside, silent_since

SAY_AFTER = "REVPATCH_SAY_AFTER"
"""The variable that sets the seconds of silence, 3 where it is not set; a stage is said again after 15."""


class Far(Protocol):
    """Notes how far the stage is."""

    def __call__(self, done: int, of: int, unit: str) -> None: ...


@contextmanager
def doing(what: str, show: Callable[[str], None] = say_aside, enabled: bool = True) -> Iterator[Far]:
    """Shows a line with `what`, how far it is and for how long, when there has been silence for some seconds.

    Args:
        what: the stage, such as "loading the base".
        show: prints a line; the default prints to standard error, beside what a command prints as its result.
        enabled: False shows nothing, as on ranks other than 0.
    """
    far = ""
    ended = threading.Event()
    began = time.monotonic()

    def note(done: int, of: int, unit: str) -> None:
        nonlocal far
        left = (time.monotonic() - began) * (of - done) / max(done, 1)
        far = f": {done:,} of {of:,} {unit}" + (f", about {left:.0f} s left" if done else "")

    def show_lines() -> None:
        said, pause = silent_since(), float(os.environ.get(SAY_AFTER, "3"))
        while not ended.wait(max(0.0, said + pause - time.monotonic())):
            if said >= silent_since():  # nothing else was shown meanwhile
                show(f"{what}{far} ({time.monotonic() - began:.0f} s so far)")
                pause = max(5 * pause, 1.0) if pause < 15 else pause
                said = time.monotonic()
            said = max(said, silent_since())

    if not enabled:
        yield note
        return
    thread = threading.Thread(target=show_lines, name="revpatch-doing", daemon=True)
    thread.start()
    try:
        yield note
    finally:
        ended.set()
        thread.join()
