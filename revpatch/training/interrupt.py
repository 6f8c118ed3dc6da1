"""SIGTERM and SIGUSR1: what a scheduler sends before it takes the node."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run was told to stop, wrote a snapshot, and goes on when it is started again."""
ONE_REQUEST_SECONDS = 1.0


class Interruption:
    """Whether this process was told to stop. A second SIGTERM ends it at once; not one that comes within a second of
    the first, as when a scheduler signals a launcher and its ranks, and the launcher passes it on.

    Installs its handlers when made, which only the main thread may do. Until `training` is set there is nothing to
    write, as all that the run has is on the disk: the process then exits as it is told.
    """

    def __init__(self) -> None:
        self.requested = False
        self.training = False
        self._since = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGTERM and time.monotonic() - self._since > ONE_REQUEST_SECONDS:
                os._exit(128 + number)
            return
        name = signal.Signals(number).name
        if not self.training:
            sys.stderr.write(f"revpatch: {name} before the first step\n")
            os._exit(EXIT_CODE)
        self.requested, self._since = True, time.monotonic()
        sys.stderr.write(f"revpatch: {name}: a snapshot is written after this step or the next; SIGTERM to exit now\n")
