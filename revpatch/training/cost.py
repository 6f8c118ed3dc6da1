"""What training costs, as far as it can be counted: memory, and arithmetic against the device's peak."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from revpatch.patch.families import head_of
from revpatch.patch.patched_model import Patch

PEAKS = {
    r"B200\b": 2250.0,
    r"H200(?! NVL)\b": 989.0,
    r"H100 PCIe": 756.0,
    r"H100 80GB HBM3": 989.0,
    r"A100\b": 312.0,
    r"L40S\b": 362.0,
    r"A10\b": 125.0,
    r"RTX 4090(?! D| Laptop)\b": 165.0,
    r"V100\b": 125.0,  # of float16: it has no bfloat16
}
"""Of CUDA devices by a pattern of their name: dense bfloat16, 10¹² operations a second, from NVIDIA's data sheets."""


def peak_tflops(device_name: str) -> float | None:
    """Peak of a CUDA device in bfloat16, 10¹² operations a second, by the name that torch gives it; None if unknown."""
    return next((peak for pattern, peak in PEAKS.items() if re.search(rf"\b{pattern}", device_name)), None)


def memory_in_use(device: torch.device) -> float:
    """Bytes: on a GPU the most that tensors have taken since the last call, on a CPU what the process has resident."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(most)
    return float(resident_bytes())


def resident_bytes(peak: bool = False) -> int:
    """What this process has resident, in bytes; with `peak` the most that it has had."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    key = "VmHWM:" if peak else "VmRSS:"
    return 1024 * int(status.split(key)[1].split()[0])


def flops_a_token(base: nn.Module, patch: Patch) -> int:
    """Floating-point operations of the student's matrix products for a token that is trained on.

    2 a base weight forward and 2 backward, as no gradient of a base weight is taken; 2 and 4 a sidecar weight. What
    attention takes over the context, the teacher and recomputation are not counted: a share of peak is a lower bound.
    """
    head = head_of(base).weight
    embeddings = {m.weight for m in base.modules() if isinstance(m, nn.Embedding)} - {head}
    products = sum(p.numel() for p in base.parameters() if p.dim() == 2 and p not in embeddings)
    return 4 * products + 6 * sum(p.numel() for p in patch.parameters() if p.dim() == 2)
