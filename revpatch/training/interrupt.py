"""SIGTERM and SIGUSR1: what a scheduler sends before it takes the node."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run was told to stop, wrote a snapshot, and goes on when it is started again."""


class Interruption:
    """Whether this process was told to stop. A second SIGTERM ends it at once.

    Installs its handlers when made, which only the main thread may do. Until `training` is set there is nothing to
    write, as all that the run has is on the disk: the process then exits as it is told.
    """

    def __init__(self) -> None:
        self.requested = False
        self.training = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGTERM:
            os._exit(128 + number)
        name = signal.Signals(number).name
        if not self.training:
            sys.stderr.write(f"revpatch: {name} before the first step\n")
            os._exit(EXIT_CODE)
        if not self.requested:
            self.requested = True
            sys.stderr.write(
                f"revpatch: {name}: a snapshot is written after this step or the next; again to exit now\n"
            )
