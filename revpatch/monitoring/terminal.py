"""The terminal: log lines of rank 0 alone, above its progress bar, and quiet libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from pathlib import Path

from rich.console import Console

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
