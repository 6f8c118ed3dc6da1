"""What the doctor looks at on one machine: each a finding, green, yellow or red, with what to do."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement

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
        """Return the fields, for JSON."""
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Colour:
    """Return the worst of the colours."""
    colours = {finding.colour for finding in findings}
    return "red" if "red" in colours else "yellow" if "yellow" in colours else "green"


SHOWN = ("torch", "transformers", "deepspeed", "accelerate")


def asked() -> list[str]:
    """Return the requirements of the installed package, without its extras.

    Raises:
        PackageNotFoundError: it is run from its source.
    """
    return [each for each in metadata.requires("revpatch") or [] if "extra ==" not in each]


def versions(
    requirements: Callable[[], Sequence[str]] = asked, version: Callable[[str], str] = metadata.version
) -> Finding:
    """Hold what is installed against the requirements."""
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


SMI_SECONDS = 60
"""After which a driver is said to hang."""


def nvidia_smi() -> str:
    """Return what `nvidia-smi -L` prints: a line for each GPU; nothing where there is no nvidia-smi.

    Raises:
        TimeoutError: it does not answer.
        ChildProcessError: it can't list the GPUs, and says why.
    """
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"`nvidia-smi -L` does not answer within {SMI_SECONDS} s") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        raise ChildProcessError(f"`nvidia-smi -L` fails: {said[0][:200]}")
    return done.stdout


def gpus(usable: Sequence[str], listed: Callable[[], str] = nvidia_smi) -> Finding:
    """Judge whether torch can use the GPUs that are there.

    Args:
        usable: names of the GPUs that torch sees.
        listed: what `nvidia-smi -L` prints.
    """
    fails = ""
    try:  # the slices of a GPU that is parted by MIG are lines of their own
        there = sum(line.startswith("GPU ") for line in listed().splitlines())
    except TimeoutError as error:
        advice = "the driver hangs: `dmesg | grep -i nvrm` may say why; reset the GPU or start the machine anew"
        return Finding("GPUs", "red", str(error), advice)
    except ChildProcessError as error:
        there, fails = 0, str(error)
    if usable and there <= len(usable):
        return Finding("GPUs", "green", f"{len(usable)}: {', '.join(sorted(set(usable)))}")
    if usable:
        advice = "CUDA_VISIBLE_DEVICES hides the others: unset it to use them, unless each rank is shown its own"
        return Finding("GPUs", "yellow", f"torch sees {len(usable)} of {there}", advice)
    if there:
        advice = "install a CUDA build of torch that the driver can run, or give the container the GPUs (--gpus all)"
        return Finding("GPUs", "red", f"{there}, and torch can use none", advice)
    if fails:
        advice = "where this machine has a GPU, mend its driver (`dmesg | grep -i nvrm` may say why) or start it anew"
        return Finding("GPUs", "yellow", f"none, and {fails}; ranks run on the CPU", advice)
    return Finding("GPUs", "yellow", "none; ranks run on the CPU", "enough for the demo; larger bases want a GPU")


def peer_access(count: int, reach: Callable[[int, int], bool] = torch.cuda.can_device_access_peer) -> Finding:
    """Judge whether the GPUs that torch sees read each other's memory, or go through the CPU's.

    Args:
        count: how many there are.
        reach: whether the first reads the second's memory.
    """
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    apart = [f"{a}-{b}" for a, b in pairs if not (reach(a, b) and reach(b, a))]
    if apart:
        advice = "ranks on GPUs that have a direct link: CUDA_VISIBLE_DEVICES; engine.deepspeed with ZeRO 0 sends least"
        return Finding("peer access", "yellow", f"through the CPU: {', '.join(apart)}", advice)
    found = f"between all {count} GPUs" if pairs else "fewer than two GPUs"
    return Finding("peer access", "green", found)


GB = 1e9


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Judge the memory through which nccl and gloo pass tensors between the ranks of a machine."""
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
    """Judge whether a folder, which may not be there yet, can be written, and has room for `needed_gb` 10⁹ bytes."""
    there = folder.absolute()
    try:
        while not _is_there(there):
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free / GB
    except OSError as error:
        found = f"{folder} can't be written by user {os.geteuid()} ({error.strerror or error})"
        with suppress(OSError):
            found += f"; {there} is user {there.stat().st_uid}'s"
        return Finding(name, "red", found, "make it this user's, or name another folder")
    found = f"{free:.1f} GB free in {folder}"
    if free < 1:
        return Finding(name, "red", found, "make room: a run stops when it can't write its snapshot")
    if free < needed_gb:
        return Finding(name, "yellow", f"{found}; {needed_gb:g} GB may be used", "make room, or lower what may be used")
    return Finding(name, "green", found)


def hub_cache(folder: Path, offline: bool) -> Finding:
    """Judge whether models and tokenizers of the hub can be kept."""
    finding = disk("hub cache", folder, 10.0)
    if finding.colour == "red":
        advice = f"{finding.advice} with HF_HOME; sudo chown -R $USER {folder} undoes a run as root"
        return Finding("hub cache", "red", finding.found, advice)
    if offline:
        advice = "unset HF_HUB_OFFLINE if the base or the data are to be fetched"
        return Finding("hub cache", "yellow", f"{finding.found}; HF_HUB_OFFLINE is set", advice)
    return finding


def bfloat16(slow: bool, on_gpu: bool) -> Finding:
    """Judge whether the default type of the base is a quick one here."""
    where = "this GPU" if on_gpu else "this CPU"
    if slow:
        what = f"{where} multiplies in bfloat16 more slowly than in float32"
        return Finding("bfloat16", "yellow", what, "--set base.dtype=float32")
    return Finding("bfloat16", "green", f"no slower than float32 on {where}")


def _is_there(path: Path) -> bool:
    """Return what `Path.exists` does, which hides on some versions of Python that a folder above may not be read."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
