"""One process writes to a run at a time: the lock of its folder, which ends with the process that holds it."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from revpatch.locks import lock_file

LOCK_NAME = ".lock"


def lock_run(run: Path) -> IO[Any] | None:
    """Locks the folder of a run until the returned file is closed; None if another process holds it.

    It holds between processes of one machine, and over a shared folder as far as its file system passes locks on; where
    it has none, a warning says so.
    Raises OSError if the folder can't be written to.
    """
    return lock_file(run / LOCK_NAME)
