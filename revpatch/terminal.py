"""The terminal: log lines above a progress bar, what a command is busy with, and streams that may go away.

What can't be printed (`| head`, a closed terminal, a full disk) is dropped, and that is noted; no command ends half-way
for it. Lines of progress do not wait for a reader that has stopped reading, such as an ssh whose network is down.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import select
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

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


_on_terminal = sys.stdout is not None and sys.stdout.isatty()  # None where it was closed before the start
# No :names: turned into pictures: paths and generated text mean what they say.
console = Console(soft_wrap=True, emoji=False, width=None if _on_terminal or "COLUMNS" in os.environ else 120)
"""The one console: log lines, tables and the progress bar share it."""

_said = time.monotonic()

_NOISY = ("DeepSpeed", "deepspeed", "transformers", "accelerate", "datasets", "torch.distributed", "tensorboard")


def quiet_libraries() -> None:
    """Keeps warnings that mean nothing here from the person; errors still come through. Call before their imports."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in _NOISY:
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        logger.addFilter(lambda record: record.levelno >= logging.ERROR)  # DeepSpeed sets its own level when imported


def silent_since() -> float:
    """Return the moment of the last line of this module, or of the start, by `time.monotonic`."""
    return _said


def say(text: str) -> None:
    """A line for the person, as it is."""
    global _said
    _said = time.monotonic()
    console.print(text, markup=False, highlight=False)


def say_aside(text: str) -> None:
    """A line on standard error, beside what a command prints as its result."""
    global _said
    _said = time.monotonic()
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def log_to(file: Path) -> None:
    """Sends the log of `revpatch` to the console and, with times, to a file."""
    log = logging.getLogger("revpatch")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    written = _LogFile(file, encoding="utf-8", errors="backslashreplace")
    written.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(written)
    log.addHandler(_ConsoleHandler())


class _LogFile(logging.FileHandler):
    """A log file whose disk may be full: that is said once, and the lines are shown all the same."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not self._said and isinstance(error, OSError):
            self._said = True
            reason = error.strerror or error
            sys.stderr.write(f"revpatch: {self.baseFilename} can't be written ({reason}): the log goes on without it\n")


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # in a program whose streams are not steady; the file has the line
            say(self.format(record))


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
