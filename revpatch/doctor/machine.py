"""This machine: shared memory, disks, the hub's cache, locks left behind, open files, bfloat16."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from revpatch.doctor.finding import Finding

GB = 1e9
STALE_SECONDS = 600.0
"""A compiler of torch's extensions is done within this, or its lock is a dead one's."""


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """nccl and gloo pass tensors between the ranks of a machine through it."""
    if not folder.is_dir():
        return Finding("shared memory", "red", f"no {folder}", "mount it: mount -t tmpfs tmpfs /dev/shm")
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / GB:.2f} GB free of {usage.total / GB:.2f} GB in {folder}"
    advice = "give the container more: docker run --shm-size=8g (or --ipc=host), an emptyDir of medium Memory"
    if usage.total <= 64 * 2**20:
        return Finding("shared memory", "red", found, f"{advice}; this is Docker's default")
    if usage.free < 1 * GB:
        return Finding("shared memory", "yellow", found, f"{advice}; or delete what dead processes left there")
    return Finding("shared memory", "green", found)


def disk(name: str, folder: Path, needed_gb: float) -> Finding:
    """Whether a folder, which may not be there yet, can be written, and has room for `needed_gb` 10⁹ bytes."""
    advice = "make it this user's, or name another folder"
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if _is_there(path))
        refused = _refuses_a_file(there)
        if refused:
            return Finding(name, "red", f"{folder}: {refused}", advice)
        free = shutil.disk_usage(there).free / GB
    except OSError as error:
        return Finding(name, "red", f"{folder} can't be looked at ({error.strerror or error})", advice)
    found = f"{free:.1f} GB free in {folder}"
    if free < 1:
        return Finding(name, "red", found, "make room: a run stops when it can't write its snapshot")
    if free < needed_gb:
        return Finding(name, "yellow", f"{found}; {needed_gb:g} GB may be used", "make room, or lower what may be used")
    return Finding(name, "green", found)


def hub_cache(folder: Path, offline: bool) -> Finding:
    """Whether models and tokenizers of the hub can be kept."""
    finding = disk("hub cache", folder, 10.0)
    if finding.colour == "red":
        advice = f"{finding.advice} with HF_HOME; sudo chown -R $USER {folder} undoes a run as root"
        return Finding("hub cache", "red", finding.found, advice)
    if offline:
        advice = "unset HF_HUB_OFFLINE if the base or the data are to be fetched"
        return Finding("hub cache", "yellow", f"{finding.found}; HF_HUB_OFFLINE is set", advice)
    return finding


def extension_locks(folder: Path, now: float | None = None) -> Finding:
    """Locks in torch's folder of compiled extensions, for which every later run waits without a word.

    Args:
        folder: TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions.
        now: seconds since the epoch; None is the clock.
    """
    now = time.time() if now is None else now
    try:
        locks = _ages(folder, now)
    except OSError as error:
        advice = "make it this user's, or name another folder with TORCH_EXTENSIONS_DIR"
        found = f"{error.filename or folder} can't be looked at ({error.strerror or error})"
        return Finding("extension locks", "red", found, advice)
    stale = [path for path, age in locks.items() if age > STALE_SECONDS]
    if stale:
        names = " ".join(str(path) for path in stale)
        return Finding("extension locks", "red", f"{len(stale)} older than ten minutes", f"rm {names}")
    if locks:
        advice = "another process is compiling; if none is, rm " + " ".join(str(path) for path in locks)
        return Finding("extension locks", "yellow", f"{len(locks)} of the last ten minutes", advice)
    return Finding("extension locks", "green", f"none in {folder}")


def open_files(limit: int | None = None) -> Finding:
    """How many files a process may have open; None asks the system."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    if limit == resource.RLIM_INFINITY:
        return Finding("open files", "green", "no limit")
    found, advice = f"at most {limit} a process", "ulimit -n 65536 (in Docker: ulimits: nofile)"
    if limit < 256:
        return Finding("open files", "red", found, advice)
    if limit < 1024:
        return Finding("open files", "yellow", found, advice)
    return Finding("open files", "green", found)


def bfloat16(slow: bool, on_gpu: bool) -> Finding:
    """Whether the default type of the base is a quick one here."""
    where = "this GPU" if on_gpu else "this CPU"
    if slow:
        what = f"{where} multiplies in bfloat16 more slowly than in float32"
        return Finding("bfloat16", "yellow", what, "--set base.dtype=float32")
    return Finding("bfloat16", "green", f"no slower than float32 on {where}")


def _is_there(path: Path) -> bool:
    """As `Path.exists`, which hides on some versions of Python that a folder above refuses to be looked into."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _ages(folder: Path, now: float) -> dict[Path, float]:
    """The files named `lock` below a folder, and how many seconds old they are."""
    ages = {}
    for path in folder.rglob("lock") if _is_there(folder) else []:
        with suppress(FileNotFoundError):  # its compiler has just finished
            found = path.stat()
            if stat.S_ISREG(found.st_mode):
                ages[path] = now - found.st_mtime
    return ages


def _refuses_a_file(folder: Path) -> str | None:
    """Why no file can be made in a folder; None if one can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"can't be written ({error.strerror or error}, by {_owner(folder)})"


def _owner(folder: Path) -> str:
    return f"user {os.geteuid()}; it is user {folder.stat().st_uid}'s"
