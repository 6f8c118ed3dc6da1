"""Locks of files, which end with the process that holds them, also on file systems that have none.

Lustre mounted without `flock`, NFS without its lock service and some CIFS refuse to lock a file. There a file in this
machine's folder for temporary files stands in: it keeps the machine's other processes out, and a warning says that it
can't keep out those of other machines.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import IO, Any

log = logging.getLogger("revpatch")

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""What a file system without locks answers."""


def lock_file(path: Path) -> IO[Any] | None:
    """Locks a file, which is made if it is missing, for this process alone until the returned file is closed.

    None if another process holds it, or has held it and removed it meanwhile. Raises OSError if it can't be opened.
    """
    file: IO[Any] = path.open("a")
    try:
        held = _try(file)
    except OSError as error:
        file.close()
        if error.errno not in NO_LOCKS:
            raise
        file = _stand_in(path, error)
        held = _try(file)
    there = path.exists() and (file.name != str(path) or os.path.samestat(path.stat(), os.fstat(file.fileno())))
    if held and there:
        return file
    file.close()
    return None


def _try(file: IO[Any]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stand_in(path: Path, error: OSError) -> IO[Any]:
    """The file on this machine that is locked in place of one whose file system has no locks."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    place = Path(tempfile.gettempdir()) / f"revpatch-{name}.lock"
    log.warning(
        "%s: its file system has no locks (%s; Lustre: mount it with -o flock, NFS: start its lock service). %s stands "
        "in, which keeps out other processes of this machine alone: start nothing on another machine that writes there",
        path.parent,
        error.strerror,
        place,
    )
    try:
        return place.open("rb")  # another user's, perhaps: a lock needs no right to write
    except FileNotFoundError:
        return place.open("ab")
