"""A home folder for processes that have none, as under a user id that a container's image does not know.

Libraries keep their caches below it: those of the hub, of torch's and triton's compilers, and the shards' own.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def ensure_home() -> None:
    """Sets HOME, for this process and those that it starts, to a folder among the temporary ones if there is no home,
    and says so; where there is one that can't be written, moves triton's cache alone, which nobody needs to keep.

    Comes before anything is imported that looks for its cache. Raises OSError if there is no place for it either.
    """
    home = _home()
    if home is None:
        home = _private_folder()
        os.environ["HOME"] = str(home)
        os.environ.setdefault("USER", str(os.geteuid()))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(
                f"revpatch: user {os.geteuid()} has no home folder, so caches go to {home}: set HOME, or HF_HOME for "
                "that of the hub, to keep them elsewhere\n"
            )
    elif not os.access(home, os.W_OK):
        os.environ.setdefault("TRITON_CACHE_DIR", str(_private_folder() / ".triton"))


def _home() -> Path | None:
    if os.environ.get("HOME") == "":  # which Python takes for the root of all files
        return None
    try:
        home = Path.home()
    except (RuntimeError, KeyError):
        return None
    return home if home.is_absolute() else None


def _private_folder() -> Path:
    """This user's own folder, in which nobody else can put files."""
    folder = Path(tempfile.gettempdir()) / f"revpatch-home-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        return Path(tempfile.mkdtemp(prefix="revpatch-home-"))
    return folder
