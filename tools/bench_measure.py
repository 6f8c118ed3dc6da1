"""What bench.py measures of a step: seconds, counted operations, peak memory, and the machine's own rate."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_ours import Peer
from bench_peers import PEERS
from bench_workload import Workload
from torch.utils.flop_counter import FlopCounterMode

from revpatch.training.cost import resident_bytes


def rates(dtype: torch.dtype) -> float:
    """Matrix products a second, in FLOP/s: 2048 x 2048 in `dtype`, for half a second."""
    a, b, out = torch.randn(3, 2048, 2048).to(dtype)
    torch.mm(a, b, out=out)
    count, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < 0.5:
        torch.mm(a, b, out=out)
        count += 1
    return count * 2 * 2048**3 / seconds


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(steps: dict[str, Callable[[], object]], rounds: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds of each, and the machine's rate, round by round; one round before that counts for nothing."""
    found: dict[str, list[float]] = {name: [] for name in (*steps, "rate")}
    for number in range(rounds + 1):
        for name, step in steps.items():
            seconds = timed(step)
            if number:
                found[name].append(seconds)
        if number:
            found["rate"].append(rates(dtype))
    return found


def _attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    """Both products of causal attention, over half of the matrix; shapes (batch, heads, time, width)."""
    batch, heads, time_q, width = query
    return 2 * batch * heads * time_q * key[-2] * (width + value[-1]) // 2


def _attention_backward(
    _: list[int], query: list[int], key: list[int], value: list[int], *__: object, **___: object
) -> int:
    """Five products for the forward pass's two."""
    return _attention(query, key, value) * 5 // 2


def flops_of(peer: Peer) -> int:
    """Counted operations of one step's matrix products and attention, which torch doesn't count on CPUs; of a step
    after the first, which finds what that one kept."""
    cpu = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    peer.step()
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        peer.step()
    return int(counter.get_total_flops())


def own_peak(name: str, workload: Workload) -> int:
    """Bytes that one step of a peer takes at its peak, in this process, over what libraries alone take.

    The optimizer has its state before; what making the model took beside it is not counted.
    """
    before = resident_bytes()
    peer = PEERS[name](workload)
    for parameter in peer.trainable():
        parameter.grad = torch.zeros_like(parameter)
    peer.optimizer.step()
    peer.optimizer.zero_grad()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    peer.step()
    return resident_bytes(peak=True) - before


def peak_of(name: str, workload: Workload, threads: int) -> float:
    """`own_peak` of a peer in a process that does nothing else."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads({threads})
from bench_measure import own_peak
from bench_workload import Workload
print(own_peak({name!r}, {workload!r}))
"""
    return float(last_line([sys.executable, "-c", script], f"the memory of {name}"))


def last_line(command: list[str], what: str) -> str:
    """What a process prints last; if it fails, that ends this one, with what it wrote to stderr."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{what} could not be measured, exit code {done.returncode}:\n{done.stderr}")
    return done.stdout.splitlines()[-1]
