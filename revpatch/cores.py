"""How many CPUs this process may use: those it may run on, and not more than its cgroup has time for.

A container that is limited to one CPU's time still sees every CPU of its machine. As many processes or threads as it
sees would wait for one another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """Return the number of CPUs that this process may use, at least 1; `root` is where /proc and /sys are."""
    affinity = len(os.sched_getaffinity(0))
    quota = quota_of(root)
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def keep_threads_to_quota() -> None:
    """Sets OMP_NUM_THREADS, where it is not set, if the cgroup gives less time than there are CPUs to run on; for this
    process and those that it starts. Comes before torch is imported, which would take a thread for each CPU."""
    if (found := cores()) < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(found))


def quota_of(root: Path = Path("/")) -> float | None:
    """Return the CPU time that the cgroups of this process allow, in CPUs, such as 1.5; None where they set no limit.

    Reads version 2 (`cpu.max`) and version 1 (`cpu.cfs_quota_us`) of cgroups. The limit of a group holds for the groups
    in it too, so the smallest on the way up counts. What can't be read sets no limit.
    """
    quotas = [quota for folder in _groups(root) if (quota := _quota_in(folder)) is not None]
    return min(quotas, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's groups that may limit its CPU time, and of those around them."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            bases = [mount, mount / "unified"]
        elif "cpu" in controllers.split(","):
            bases = [mount / controllers, mount / "cpu"]
        else:
            continue
        for base in bases:
            inside = base / path.lstrip("/")
            # In a container the path may be that of the machine, which is not there: then the mount is the group.
            yield from (folder for folder in (inside, *inside.parents) if folder == base or base in folder.parents)


def _quota_in(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
        return float(quota) / float(period) if quota != "max" and float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
