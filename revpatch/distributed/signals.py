"""The signals that ask a training to stop: a scheduler's before it takes the node, Ctrl-C, a closed terminal."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run was told to stop, wrote a snapshot, and resumes when it is started again."""
ONE_REQUEST_SECONDS = 0.3
"""When Slurm signals all processes of a job, or a terminal those in its foreground, torchrun and deepspeed hand their
own on to the ranks within some milliseconds; deepspeed a second time after a tenth of a second."""
ONE_REQUEST_AT_MOST = 1.0
"""Seconds from the first signal, so that somebody who goes on pressing Ctrl-C is heard."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_INSISTING = (signal.SIGTERM, signal.SIGINT)
"""A second one of these ends the process. SIGHUP comes once from the terminal and once from the shell."""


class Interruption:
    """Whether this process was told to stop. A second SIGTERM or SIGINT ends it at once; not one that comes within
    ONE_REQUEST_SECONDS of the one before, as when a scheduler or a terminal signals a launcher and its ranks, and the
    launcher passes it on: who sent a signal is not told to a handler, and would not tell that one from a person's.

    Takes the signals when made, which only the main thread may do, and acts on them in a thread of its own: the main
    thread may be waiting for another rank, where Python's handlers don't run. Until `training` is set there is nothing
    to write, as all that the run has is on the disk: the process then exits as it is told. Once `settled` is set the
    snapshot is written and signals change nothing any more. A signal that was ignored before, as SIGHUP is under
    nohup, stays ignored. As a context manager it gives the signals back at its end.
    """

    def __init__(self) -> None:
        self.requested = False
        self.training = False
        self.settled = False
        self._first: float | None = None
        self._last = 0.0
        received, self._sent = os.pipe()
        os.set_blocking(self._sent, False)
        self._before: dict[signal.Signals, Any] = {}
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(self._sent, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(received,), name="revpatch-signals", daemon=True).start()

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> Interruption:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(self._sent)

    def _listen(self, received: int) -> None:
        while numbers := os.read(received, 64):
            for number in numbers:
                if number in self._before:
                    self._handle(signal.Signals(number))
        os.close(received)

    def _handle(self, number: signal.Signals) -> None:
        if self.settled:
            return
        if number in _INSISTING:
            now = time.monotonic()
            first = self._first = self._first or now
            if now - (self._last or now) > ONE_REQUEST_SECONDS or now - first > ONE_REQUEST_AT_MOST:
                os._exit(128 + number)
            self._last = now
        if self.requested:
            return
        if not self.training:
            _say(f"{number.name} before the first step")
            os._exit(EXIT_CODE)
        self.requested = True
        again = "another SIGTERM or Ctrl-C" if self._first is not None else "two SIGTERMs or Ctrl-Cs"
        _say(f"{number.name}: a snapshot is written after this step or the next; {again} to exit now")


def _say(words: str) -> None:
    try:
        sys.stderr.write(f"revpatch: {words}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # a terminal that was closed: what was asked for is done all the same
        pass
