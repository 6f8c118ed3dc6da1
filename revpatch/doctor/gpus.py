"""The GPUs and the links between them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable

import torch

from revpatch.doctor.finding import Finding

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
