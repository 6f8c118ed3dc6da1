"""Which launcher started this process, and as which rank, read from the environment; training and doctor share it.

torchrun, deepspeed and accelerate launch set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; Kubeflow sets
all but LOCAL_RANK. srun, mpirun, jsrun, Flux and PALS have variables of their own, and the five are derived from them.
Plain python sets none, and is one process.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    import torch


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MPI = (
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    ("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    ("PALS' mpiexec", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID"),
    ("OpenMPI's mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MVAPICH's mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("MPICH's mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
"""Launcher, and the names of its rank, size and local rank. The first three set MPI's own variables as well, which know
nothing of a local rank or call it otherwise: theirs are read first."""
_MPI_HERE = (
    *("JSM_NAMESPACE_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
    *("OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
)
_ONE_ENVIRONMENT = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""What torchrun and deepspeed set, which start all ranks of a machine in one environment."""
_MPI_PORT = 29500
"""Where mpiexec gives its tasks no name that tells one call from another."""


@dataclass(frozen=True)
class Launch:
    """Which rank this process is, and where the ranks meet."""

    rank: int
    world: int
    local_rank: int
    address: str = field(default="127.0.0.1", compare=False)
    port: int = field(default=0, compare=False)
    """0: any that is free, for a single process."""
    launcher: str = field(default="none", compare=False)
    warning: str | None = field(default=None, compare=False)
    """Why there may be other ranks than were asked for, and what to do."""
    one_environment: bool = field(default=False, compare=False)
    """All ranks of a machine see the same GPUs."""

    @classmethod
    def from_environment(cls) -> Launch:
        """Return what `read_launch` does of this process, and set the five variables that the engines read.

        Raises:
            ValueError: see `read_launch`.
        """
        launch = read_launch(os.environ)
        port = launch.port or _free_port()
        values = (launch.rank, launch.world, launch.local_rank, launch.address, port)
        os.environ.update({name: str(value) for name, value in zip(NAMES, values, strict=True)})
        return launch

    def device(self) -> torch.device:
        """Return this rank's GPU, or the CPU where there is none. A rank that is shown one GPU, as Slurm can do it,
        takes that one.

        Raises:
            ValueError: there are GPUs, but fewer than ranks on this machine.
        """
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        shown = torch.cuda.device_count()
        if self.local_rank < shown:
            return torch.device("cuda", self.local_rank)
        if shown == 1 and not self.one_environment:  # that no two ranks have the same one is seen when they meet
            return torch.device("cuda", 0)
        raise ValueError(
            f"LOCAL_RANK={self.local_rank}, but this machine shows {shown} GPUs: start at most one rank a GPU, and let "
            "each see all GPUs of its machine, or one of its own"
        )


@dataclass(frozen=True)
class _Tasks:
    """What srun or mpirun says of the tasks that it started."""

    by: str
    rank: int
    world: int
    local_rank: int
    here: int | None
    """How many are on this machine; None if that isn't said."""
    nodes: str | None
    port: int


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Return which rank a process with this environment is; changes nothing.

    Raises:
        ValueError: variables are missing, malformed or contradict one another.
    """
    given = {name: environment[name].strip() for name in NAMES if name in environment}
    try:
        tasks = _tasks(environment)
    except ValueError:
        if len(given) < len(NAMES):
            raise
        tasks = None  # the five say all that there is to say
    said = {"RANK", "WORLD_SIZE"} & given.keys()
    if not said and tasks is None:
        _refuse_torchruns(environment)
        return Launch(0, 1, 0, warning=_fewer_than_asked(environment))
    if said == {"WORLD_SIZE"} and tasks is None and given["WORLD_SIZE"] == "1":
        return Launch(0, 1, 0)
    values = _filled(environment, given, tasks)
    rank, world, local_rank = _ranks(values)
    by, one_environment = _launcher(environment, tasks), any(name in environment for name in _ONE_ENVIRONMENT)
    warning = _other_than_asked(tasks, world, one_environment) if said else None
    if world == 1:
        return Launch(rank, world, local_rank, launcher=by, warning=warning, one_environment=one_environment)
    address, port = _check_address(values["MASTER_ADDR"]), _check_port(values["MASTER_PORT"])
    return Launch(rank, world, local_rank, address, port, by, warning, one_environment)


def rank_and_local_rank() -> tuple[int, int]:
    """Return those of this process, for messages; what is known of them where the variables can't be used."""
    try:
        launch = read_launch(os.environ)
    except ValueError:
        return _number(os.environ.get("RANK")) or 0, _number(os.environ.get("LOCAL_RANK")) or 0
    return launch.rank, launch.local_rank


def launch_id() -> str | None:
    """Return what is the same whenever one launcher starts one command again: of Slurm the job and its step, of
    torchrun its own process on this machine; None under launchers that start nothing again, or don't say so."""
    job, step = os.environ.get("SLURM_JOB_ID"), _number(os.environ.get("SLURM_STEP_ID"))
    if job and "SLURM_PROCID" in os.environ and step != 0xFFFFFFFA:  # not by hand in a shell of salloc
        return f"slurm {job}.{os.environ.get('SLURM_STEP_ID', '')}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        started = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        return f"torchrun {socket.gethostname()} {os.getppid()} {started}"
    return None


def _filled(environment: Mapping[str, str], given: dict[str, str], tasks: _Tasks | None) -> dict[str, str]:
    """Return the five variables: those that are set, and what follows from srun's or mpirun's for the others."""
    values = dict(given)
    if tasks is not None:
        derived = {"RANK": str(tasks.rank), "WORLD_SIZE": str(tasks.world)}
        said = derived.keys() & values.keys()
        if len(said) == 1 and (name := next(iter(said))) and values[name] != derived[name]:
            raise ValueError(
                f"{name}={values[name]}, but {tasks.by} started this process as task {tasks.rank} of {tasks.world}: "
                f"unset {name}, which something else has left"
            )
        if not said or "LOCAL_RANK" not in values:
            values["LOCAL_RANK"] = str(tasks.local_rank)
        values |= {name: value for name, value in derived.items() if name not in values}
        if values["WORLD_SIZE"] != "1":
            values.setdefault("MASTER_PORT", str(tasks.port))
            if "MASTER_ADDR" not in values:
                values["MASTER_ADDR"] = _first_host(tasks)
    single = values.get("WORLD_SIZE") == "1"
    missing = [name for name in NAMES if name not in values and not (single and name.startswith("MASTER_"))]
    if missing == ["LOCAL_RANK"]:  # as in Kubeflow, where a machine is a pod of one rank
        if (ranks := _number(environment.get("PET_NPROC_PER_NODE"))) is not None and ranks > 1:
            raise ValueError(
                f"PET_NPROC_PER_NODE={ranks} asks for {ranks} ranks a pod, and this is one process without LOCAL_RANK: "
                "start with `torchrun -m revpatch` instead of `python -m revpatch`"
            )
        values["LOCAL_RANK"], missing = "0", []
    if missing:
        raise ValueError(
            f"{', '.join(f'{name}={values[name]}' for name in NAMES if name in values)}, but {', '.join(missing)} "
            "missing: start with torchrun, deepspeed, accelerate launch or srun, or set all five of "
            f"{', '.join(NAMES)}; for a single process, unset RANK and WORLD_SIZE"
        )
    return values


def _ranks(values: Mapping[str, str]) -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK as numbers that fit one another."""
    found = {name: _number(values[name]) for name in NAMES[:3]}
    if wrong := [f"{name}={values[name]!r}" for name, number in found.items() if number is None]:
        raise ValueError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, found {', '.join(wrong)}: start with a "
            "launcher, which sets them; for a single process, unset them"
        )
    rank, world, local_rank = (number or 0 for number in found.values())
    if world < 1:
        raise ValueError(f"WORLD_SIZE={world}: it is the number of all ranks, 1 or more")
    for name, number in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if not 0 <= number < world:
            raise ValueError(
                f"{name}={number} must lie in 0 to WORLD_SIZE-1={world - 1}: start with a launcher, which sets all "
                "three; for a single process, unset RANK, WORLD_SIZE and LOCAL_RANK"
            )
    return rank, world, local_rank


def _check_address(address: str) -> str:
    """Return the address; raises ValueError if it can be no host's name or IP address."""
    what = f"MASTER_ADDR={address!r}"
    advice = "it is the name or the IP address of the machine of rank 0, and nothing else"
    if not address or "/" in address:
        raise ValueError(f"{what} is no host: {advice}")
    if len(names := re.split(r"[\s,]+", address)) > 1:
        raise ValueError(f"{what} names {len(names)} hosts: {advice}")
    if "[" in address or re.fullmatch(r"[^:]+:\d*", address):
        raise ValueError(f"{what} has more than a host: {advice}; its port is MASTER_PORT")
    return address


def _check_port(port: str) -> int:
    """Return the port; raises ValueError if it is none."""
    number = _number(port)
    if number is None or not 0 < number < 2**16:
        raise ValueError(f"MASTER_PORT={port} is no port: choose one from 1024 to 65535, the same on every rank")
    return number


def _tasks(environment: Mapping[str, str]) -> _Tasks | None:
    """Return what MPI's launchers or srun say; None if this is no task of theirs."""
    slurm = _slurm_task(environment)
    for by, *names in _MPI:
        if names[0] not in environment:
            continue
        rank, world = (_needed(environment, name, by) for name in names[:2])
        if slurm is not None and (slurm.rank, slurm.world) == (rank, world):
            return slurm  # srun sets MPI's as well, and says more
        here = next((_number(environment[name]) for name in _MPI_HERE if name in environment), None)
        if by == "Flux" and environment.get("FLUX_JOB_NNODES") == "1":
            here = world
        local_rank = _number(environment.get(names[2]))
        if local_rank is None:
            local_rank = rank if here == world else 0
        job = environment.get("PMIX_NAMESPACE")
        port = _MPI_PORT if job is None else 20_000 + crc32(job.encode()) % 10_000
        return _checked(_Tasks(by, rank, world, local_rank, here, environment.get("SLURM_JOB_NODELIST"), port))
    return slurm


def _slurm_task(environment: Mapping[str, str]) -> _Tasks | None:
    """Return what srun says; None in the script of a job or in an interactive shell, which are one process and no
    task."""
    if "SLURM_PROCID" not in environment:
        return None
    rank = _needed(environment, "SLURM_PROCID", "srun")
    step = _number(environment.get("SLURM_STEP_ID"))
    if rank == 0 and (step is None or step >= 0xFFFFFFF0):  # Slurm's numbers of the script and of a shell
        return None
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    world = _needed(environment, name, "srun")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    count = _number(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES")))
    job = _number(environment.get("SLURM_JOB_ID"))
    port = 20_000 + ((job or 0) + 1009 * (step or 0)) % 10_000
    local_rank = _number(environment.get("SLURM_LOCALID")) or 0
    return _checked(_Tasks("srun", rank, world, local_rank, world if count == 1 else None, nodes, port))


def _checked(tasks: _Tasks) -> _Tasks:
    if not 0 <= tasks.rank < tasks.world:
        raise ValueError(f"{tasks.by} says that this is task {tasks.rank} of {tasks.world}, which can't be")
    return tasks


def _first_host(tasks: _Tasks) -> str:
    """Return where rank 0 is: this machine if all tasks are here, else the first of Slurm's nodes."""
    if tasks.here == tasks.world:
        return "127.0.0.1"
    if tasks.nodes and "(" not in tasks.nodes:
        # node[03-05,7],big1 begins with node03: the first number in each bracket.
        first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^\]]*\])*", tasks.nodes)[0])  # type: ignore[index]
        if re.fullmatch(r"[\w.-]+", first):
            return first
    how = {
        "srun": 'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" before srun',
        "MPICH's mpiexec": "mpiexec -genv MASTER_ADDR HOST -genv MASTER_PORT 29500, HOST being the machine of rank 0",
    }
    handed_on = "export MASTER_ADDR=HOST MASTER_PORT=29500 before it, HOST being the machine of rank 0"
    how |= dict.fromkeys(("jsrun", "Flux", "PALS' mpiexec"), handed_on)
    other = "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500, HOST being the machine of rank 0"
    raise ValueError(
        f"{tasks.by} started this process as task {tasks.rank} of {tasks.world}, and does not say on which machine "
        f"task 0 is: {how.get(tasks.by, other)}"
    )


def _launcher(environment: Mapping[str, str], tasks: _Tasks | None) -> str:
    if "TORCHELASTIC_RUN_ID" in environment:
        return "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in environment else "torchrun"
    if "CROSS_RANK" in environment and "LOCAL_SIZE" in environment:
        return "deepspeed"
    return "RANK and WORLD_SIZE, as set" if tasks is None else tasks.by


def _other_than_asked(tasks: _Tasks | None, world: int, one_environment: bool) -> str | None:
    """Of RANK and WORLD_SIZE that are set in a task of srun or mpirun, which says something else. torchrun and
    deepspeed may start several ranks in each task."""
    if tasks is None or world == tasks.world or (one_environment and world > tasks.world):
        return None
    what = f"{tasks.by} started {tasks.world} tasks, but WORLD_SIZE={world}"
    if world < tasks.world:
        return f"{what}: other tasks train by themselves; unset RANK and WORLD_SIZE to make each task a rank"
    return f"{what}: the others must come from elsewhere; unset RANK and WORLD_SIZE to make each task a rank"


def _fewer_than_asked(environment: Mapping[str, str]) -> str | None:
    """Of a process without peers, which its launcher may have been meant to give it."""
    if "ACCELERATE_USE_CPU" in environment and "MASTER_PORT" in environment:  # set if more than one was asked for
        asked = _asked_of_accelerate()
        if asked == 1:
            return None
        return (
            f"accelerate launch was asked for {asked or 'several'} processes and has started one, so this is a single "
            "rank: add --multi_gpu (on CPUs too, without --cpu), or start with torchrun --nproc_per_node"
        )
    tasks = _number(environment.get("SLURM_NTASKS"))
    if tasks is not None and tasks > 1:
        return (
            f"this Slurm job has {tasks} tasks, and this process was started without srun, so it is a single rank: "
            "put srun before the command to make each task a rank, or use launch/slurm.sbatch"
        )
    return None


def _asked_of_accelerate() -> int | None:
    """Return how many processes the command line of accelerate asks for; None if that can't be read."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\0--num[_-]processes[\0=](\d+)\0", words)
    return None if found is None else int(found[1])


def _refuse_torchruns(environment: Mapping[str, str]) -> None:
    """Raises ValueError where variables are set that torchrun would have read, as in Kubeflow's jobs, and it has not
    been started: each machine would train by itself."""
    for name in ("PET_NNODES", "PET_NPROC_PER_NODE"):
        found = re.match(r"\d+", environment.get(name, ""))
        if found is not None and int(found[0]) > 1:
            raise ValueError(
                f"{name}={environment[name]} asks torchrun for several ranks, and this process was started without it: "
                f"start with `torchrun -m revpatch` instead of `python -m revpatch`, or unset {name}"
            )


def _needed(environment: Mapping[str, str], name: str, by: str) -> int:
    number = _number(environment.get(name))
    if number is None:
        found = f"{name}={environment[name]!r}" if name in environment else f"{name} is missing"
        raise ValueError(
            f"{by} must say by {name}, a whole number, which task this is, and of how many; found {found}: "
            f"set {', '.join(NAMES)} by yourself"
        )
    return number


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\s*-?[0-9]+\s*", text) else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
