"""What the doctor looks at on one machine: each a finding, green, yellow or red, with what to do."""

from __future__ import annotations

import ipaddress
import os
import platform
import re
import resource
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement

from revpatch.distributed import NAMES, Launch, read_launch

Colour = Literal["green", "yellow", "red"]


@dataclass(frozen=True)
class Finding:
    """Green is fine, yellow is slower or riskier than it need be, red keeps a run from training."""

    check: str
    colour: Colour
    found: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""

    def __post_init__(self) -> None:
        assert (self.colour == "green") == (not self.advice), f"{self.check}: advice goes with yellow and red"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Colour:
    """The worst of the colours."""
    colours = {finding.colour for finding in findings}
    return "red" if "red" in colours else "yellow" if "yellow" in colours else "green"


SHOWN = ("torch", "transformers", "deepspeed", "accelerate")


def asked() -> list[str]:
    """The requirements of the installed package, without its extras.

    Raises:
        PackageNotFoundError: it is run from its source.
    """
    return [each for each in metadata.requires("revpatch") or [] if "extra ==" not in each]


def versions(
    requirements: Callable[[], Sequence[str]] = asked, version: Callable[[str], str] = metadata.version
) -> Finding:
    """Holds what is installed against the requirements."""
    try:
        wanted = [Requirement(each) for each in requirements()]
    except metadata.PackageNotFoundError:
        return Finding("versions", "yellow", "revpatch runs from its source", "pip install -e . in the checkout")
    missing, other = [], []
    for requirement in wanted:
        try:
            found = version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            other.append(f"{requirement.name} {found}, not {requirement.specifier}")
    if missing:
        return Finding("versions", "red", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    if other:
        advice = "install what is asked for; the tests were not run with these"
        return Finding("versions", "yellow", "; ".join(other), advice)
    shown = [f"{name} {version(name)}" for name in SHOWN]
    return Finding("versions", "green", ", ".join([f"python {platform.python_version()}", *shown]))


_RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
"""Where launchers say how many ranks they start on a machine: torchrun, deepspeed, Slurm."""


def under_launcher(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher started this process, and its ranks are to be looked at together."""
    try:
        return read_launch(environment).launcher != "none"
    except ValueError:
        return True


def launcher(environment: Mapping[str, str], resolve: Callable[..., Any] = socket.getaddrinfo) -> Finding:
    """Judges the variables of a process, as `read_launch` reads them."""
    set_ = {name: environment[name] for name in NAMES if name in environment}
    found = ", ".join(f"{name}={value}" for name, value in set_.items())
    try:
        launch = read_launch(environment)
    except ValueError as error:
        return Finding("launcher", "red", found or "no RANK", str(error))
    if launch.launcher == "none":
        if launch.warning is not None:
            return Finding("launcher", "yellow", "none; one process", launch.warning)
        if set_:
            advice = "no launcher is meant by them, and one process is started: unset them"
            return Finding("launcher", "yellow", f"{found}, left by something else", advice)
        return Finding("launcher", "green", "none; one process")
    found = f"{launch.launcher}: rank {launch.rank} of {launch.world}, local {launch.local_rank}"
    if launch.world > 1:
        found += f", {launch.address}:{launch.port}"
        if wrong := _unreachable(environment, launch, resolve):
            return Finding("launcher", "red", found, wrong)
    if launch.warning is not None:
        return Finding("launcher", "yellow", found, launch.warning)
    return Finding("launcher", "green", found)


def _unreachable(environment: Mapping[str, str], launch: Launch, resolve: Callable[..., Any]) -> str | None:
    """What to do about a name that other machines can't be reached by, or can't reach this one by."""
    address, world = launch.address, launch.world
    try:
        found = _addresses(address, resolve)
    except OSError as error:
        return f"this machine can't find {address} ({error}): use its IP address, or mend /etc/hosts or the DNS"
    here = next((int(environment[name]) for name in _RANKS_HERE if environment.get(name, "").isdigit()), world)
    if world <= here:
        return None
    if found and all(ipaddress.ip_address(each).is_loopback for each in found):
        others = f"{world - here} ranks are on other machines, which can't reach this"
        resolved = "" if address in found else f", which is {', '.join(found)} here"
        return f"{others} {address}{resolved}: name the host by an address of the network, or mend /etc/hosts"
    name = socket.gethostname()
    try:
        own = _addresses(name, resolve)
    except OSError:
        return None  # gloo then asks the system for a network card
    if own and all(ipaddress.ip_address(each).is_loopback for each in own) and "GLOO_SOCKET_IFNAME" not in environment:
        return (
            f"this machine takes its own name {name} for {', '.join(own)}, and gloo would listen there: mend "
            "/etc/hosts, or name the network card with GLOO_SOCKET_IFNAME"
        )
    return None


def _addresses(host: str, resolve: Callable[..., Any]) -> list[str]:
    """The IP addresses of a host, without the scope of a link-local one."""
    return sorted({str(each[4][0]).split("%")[0] for each in resolve(host, None)})


_SLOW = ("SYS", "NODE", "PHB")
"""nvidia-smi's words for a way through the CPU; NV#, PIX and PXB are direct."""
_SECONDS = 60


def nvidia_smi(*arguments: str) -> str | None:
    """What nvidia-smi prints; None where there is none, or where it can't say that.

    Raises:
        TimeoutError: it does not answer.
        ChildProcessError: it can't list the GPUs, and says why.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"`{' '.join(command)}` does not answer within {_SECONDS} s") from None
    if done.returncode and arguments == ("-L",):
        said = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        raise ChildProcessError(f"`{' '.join(command)}` fails: {said[0][:200]}")
    return done.stdout if done.returncode == 0 else None


def gpus_and_links(ask: Callable[..., str | None], usable: list[str]) -> list[Finding]:
    """Both findings.

    Args:
        ask: `nvidia_smi`.
        usable: names of the GPUs that torch sees.
    """
    try:
        listed = ask("-L")
        count = max(_listed(listed), len(usable))
        return [gpus(listed, usable), links(ask("topo", "-m"), count)]
    except TimeoutError as error:
        advice = "the driver hangs: `dmesg | grep -i nvrm` may say why; reset the GPU or start the machine anew"
        return [Finding("GPUs", "red", str(error), advice)]
    except ChildProcessError as error:
        if usable:
            return [gpus(None, usable), links(None, len(usable))]
        advice = "where this machine has a GPU, mend its driver (`dmesg | grep -i nvrm` may say why) or start it anew"
        return [Finding("GPUs", "yellow", f"none, and {error}; ranks run on the CPU", advice)]


def gpus(listed: str | None, usable: list[str]) -> Finding:
    """Whether torch can use the GPUs that are there.

    Args:
        listed: `nvidia-smi -L`.
        usable: names of the GPUs that torch sees.
    """
    there = _listed(listed)
    if usable and there <= len(usable):
        return Finding("GPUs", "green", f"{len(usable)}: {', '.join(sorted(set(usable)))}")
    if usable:
        found = f"torch sees {len(usable)} of {there}"
        advice = "CUDA_VISIBLE_DEVICES hides the others: unset it to use them, unless each rank is shown its own"
        return Finding("GPUs", "yellow", found, advice)
    if there:
        advice = "install a CUDA build of torch that the driver can run, or give the container the GPUs (--gpus all)"
        return Finding("GPUs", "red", f"{there}, and torch can use none", advice)
    return Finding("GPUs", "yellow", "none; ranks run on the CPU", "enough for the demo; larger bases want a GPU")


def links(matrix: str | None, count: int) -> Finding:
    """How the GPUs are connected.

    Args:
        matrix: `nvidia-smi topo -m`.
        count: how many GPUs there are.
    """
    pairs = _pairs(matrix or "")
    if count < 2:
        return Finding("GPU links", "green", "fewer than two GPUs")
    if not pairs:
        advice = "see what `nvidia-smi topo -m` says; NCCL_DEBUG=INFO shows which way nccl takes"
        return Finding("GPU links", "yellow", f"unknown, between {count} GPUs", advice)
    kinds = ", ".join(f"{list(pairs.values()).count(kind)} x {kind}" for kind in sorted(set(pairs.values())))
    slow = [f"{a}-{b}" for (a, b), kind in pairs.items() if kind in _SLOW]
    if slow:
        advice = "ranks on GPUs that have a direct link: CUDA_VISIBLE_DEVICES; engine.deepspeed with ZeRO 0 sends least"
        return Finding("GPU links", "yellow", f"{kinds}; through the CPU: {', '.join(slow)}", advice)
    return Finding("GPU links", "green", kinds)


def usable_gpus() -> list[str]:
    """Names of the GPUs that torch sees."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _listed(listed: str | None) -> int:
    """How many GPUs `nvidia-smi -L` names; the slices of a GPU that is parted by MIG are lines of their own."""
    return sum(line.startswith("GPU ") for line in (listed or "").splitlines())


def _pairs(matrix: str) -> dict[tuple[str, str], str]:
    """The upper half of the matrix: (GPU, GPU) to the kind of link."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in matrix.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line and re.fullmatch(r"GPU\d+", line[0]) and "X" in line}
    names = list(rows)
    return {
        (a, b): rows[a][column]
        for row, a in enumerate(names)
        for column, b in enumerate(names)
        if column > row and column < len(rows[a])
    }


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
