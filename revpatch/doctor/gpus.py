"""The GPUs and the links between them."""

from __future__ import annotations

import re
import shutil
import subprocess

import torch

from revpatch.doctor.finding import Finding

_SLOW = ("SYS", "NODE", "PHB")
"""nvidia-smi's words for a way through the CPU; NV#, PIX and PXB are direct."""


def nvidia_smi(*arguments: str) -> str | None:
    """What nvidia-smi prints; None where there is none, or no GPU that it sees."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout if done.returncode == 0 else None


def gpus(listed: str | None, usable: list[str]) -> Finding:
    """Whether torch can use the GPUs that are there.

    Args:
        listed: `nvidia-smi -L`.
        usable: names of the GPUs that torch sees.
    """
    there = len(listed.strip().splitlines()) if listed else 0
    if usable and there <= len(usable):
        return Finding("GPUs", "green", f"{len(usable)}: {', '.join(sorted(set(usable)))}")
    if usable:
        found = f"torch sees {len(usable)} of {there}"
        return Finding("GPUs", "yellow", found, "CUDA_VISIBLE_DEVICES hides the others: unset it to use them")
    if there:
        advice = "install a CUDA build of torch that the driver can run, or give the container the GPUs (--gpus all)"
        return Finding("GPUs", "red", f"{there}, and torch can use none", advice)
    return Finding("GPUs", "yellow", "none; ranks run on the CPU", "enough for the demo; larger bases want a GPU")


def links(matrix: str | None) -> Finding:
    """How the GPUs are connected.

    Args:
        matrix: `nvidia-smi topo -m`.
    """
    pairs = _pairs(matrix or "")
    if not pairs:
        return Finding("GPU links", "green", "fewer than two GPUs")
    kinds = ", ".join(f"{list(pairs.values()).count(kind)} x {kind}" for kind in sorted(set(pairs.values())))
    slow = [f"{a}-{b}" for (a, b), kind in pairs.items() if kind in _SLOW]
    if slow:
        advice = "ranks on GPUs that have a direct link: CUDA_VISIBLE_DEVICES; engine.deepspeed with ZeRO 0 sends least"
        return Finding("GPU links", "yellow", f"{kinds}; through the CPU: {', '.join(slow)}", advice)
    return Finding("GPU links", "green", kinds)


def usable_gpus() -> list[str]:
    """Names of the GPUs that torch sees."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


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
