"""SIGTERM and SIGUSR1: what a scheduler sends before it takes the node."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run was told to stop, wrote a snapshot, and goes on when it is started again."""
ONE_REQUEST_SECONDS = 0.3
"""When Slurm signals all processes of a job, torchrun hands its own on to the ranks within some milliseconds."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Whether this process was told to stop. A second SIGTERM ends it at once; not one that comes within
    ONE_REQUEST_SECONDS of the first, as when a scheduler signals a launcher and its ranks, and the launcher passes it
    on: who sent a signal is not told to a handler, and would not tell that one from a person's.

    Takes the signals when made, which only the main thread may do, and acts on them in a thread of its own: the main
    thread may be waiting for another rank, where Python's handlers don't run. Until `training` is set there is nothing
    to write, as all that the run has is on the disk: the process then exits as it is told.
    """

    def __init__(self) -> None:
        self.requested = False
        self.training = False
        self._terminated: float | None = None  # when the first SIGTERM came
        received, sent = os.pipe()
        os.set_blocking(sent, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(received,), name="revpatch-signals", daemon=True).start()

    def __call__(self) -> bool:
        return self.requested

    def _listen(self, received: int) -> None:
        while numbers := os.read(received, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._handle(number)

    def _handle(self, number: int) -> None:
        if number == signal.SIGTERM:
            if self._terminated is not None and time.monotonic() - self._terminated > ONE_REQUEST_SECONDS:
                os._exit(128 + number)
            self._terminated = self._terminated or time.monotonic()
        if self.requested:
            return
        name = signal.Signals(number).name
        if not self.training:
            sys.stderr.write(f"revpatch: {name} before the first step\n")
            sys.stderr.flush()
            os._exit(EXIT_CODE)
        self.requested = True
        again = "another SIGTERM" if self._terminated is not None else "two SIGTERMs"
        sys.stderr.write(f"revpatch: {name}: a snapshot is written after this step or the next; {again} to exit now\n")
