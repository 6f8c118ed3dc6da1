"""Standard output and standard error that may go away in the middle: `| head`, a closed terminal, a full disk.

What can't be printed is dropped, and that is noted; no command ends half-way for it. Work whose lines are only progress
does not wait either for a reader that has stopped reading, such as an ssh whose network is down.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 5.0
"""So long does `never_wait` wait once for a reader that takes nothing; then what it does not take is dropped."""
_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.ENXIO)
_steady: dict[int, _Raw] = {}


class _Raw(io.FileIO):
    """The descriptor of a standard stream, which takes all that it is given."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.lost: OSError | None = None
        """Why something was dropped first, None while nothing was."""
        self._opened = descriptor
        self._patience: float | None = None

    def write(self, data: Any, /) -> int:
        """Returns how many bytes were written, or dropped."""
        while True:
            try:
                written = os.write(self._opened, data)
            except OSError as error:
                if isinstance(error, BlockingIOError) and self._becomes_ready():
                    continue
                self.lost = self.lost or error
                return len(data)
            self._patience = None if self._patience is None else PATIENCE_SECONDS
            return written

    def never_wait(self) -> None:
        """From here on waits for a reader at most `PATIENCE_SECONDS`. Files, which never wait, stay as they are."""
        mode = os.fstat(self._opened).st_mode
        if self._patience is None and (stat.S_ISFIFO(mode) or os.isatty(self._opened)):
            try:  # opened anew, as the flag would be that of all processes on this terminal
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._opened = os.open(f"/proc/self/fd/{self._opened}", flags)
            except OSError:
                return
            self._patience = PATIENCE_SECONDS

    def _becomes_ready(self) -> bool:
        poll = select.poll()
        poll.register(self._opened, select.POLLOUT)
        # Without `never_wait` the flag came with the descriptor, and its reader is worth any wait.
        if poll.poll(None if self._patience is None else 1000 * self._patience):
            return True
        self._patience = 0.0
        return False


def make_steady() -> None:
    """Makes this process's standard streams steady, and opens those that are closed on the null device.

    A closed one would else be given to the next file that is opened, and what a library prints would go into it.
    Text that the stream's encoding can't hold is written as escapes.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # to the end
        elif isinstance(stream, io.TextIOWrapper) and _descriptor_of(stream) == descriptor:
            stream.flush()
            raw = _steady[descriptor] = _Raw(descriptor)
            each_line = stream.line_buffering or stream.write_through
            text = io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, errors="backslashreplace", line_buffering=each_line
            )
            setattr(sys, name, text)


def never_wait() -> None:
    """Says that what this process prints is only progress: it is dropped where its reader does not take it."""
    for raw in _steady.values():
        raw.never_wait()


def reader_has_gone() -> bool:
    """Return whether nobody can read standard output any more: `| head` has ended, or the terminal was closed."""
    lost = _lost()
    return lost is not None and lost.errno in _GONE


def unwritten() -> OSError | None:
    """Return why standard output is not whole where its reader still wants it, such as a file on a full disk."""
    lost = _lost()
    return None if lost is None or lost.errno in _GONE or isinstance(lost, BlockingIOError) else lost


def flush() -> None:
    """Writes what is still held back of both streams."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _lost() -> OSError | None:
    return _steady[1].lost if 1 in _steady else None


def _descriptor_of(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None
