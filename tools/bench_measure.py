"""What bench.py measures of a step: seconds, counted operations, peak memory, and the machine's own rate."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_ours import Peer
from bench_workload import Workload, synchronize
from progress import Progress
from torch.utils.flop_counter import FlopCounterMode

from revpatch.train.startup import resident_bytes

SIDE = {"cpu": 2048, "cuda": 8192}
"""Of the matrices whose product is a device's own rate: large enough to fill it."""
CALLS = {"cpu": 1, "cuda": 10}
"""A GPU is given so many calls at once, as the trainer gives it steps, or its waiting for the host would be timed."""


def rates(dtype: torch.dtype, device: str = "cpu") -> float:
    """Matrix products a second, in FLOP/s: random square matrices of `dtype`, for half a second."""
    side = SIDE[device]
    a, b, out = torch.randn(3, side, side, device=device).to(dtype)
    torch.mm(a, b, out=out)
    count, seconds, start = 0, 0.0, time.perf_counter()
    synchronize(device)
    while seconds < 0.5:
        for _ in range(CALLS[device]):
            torch.mm(a, b, out=out)
        synchronize(device)
        count += CALLS[device]
        seconds = time.perf_counter() - start
    return count * 2 * side**3 / seconds


def timed(function: Callable[[], object], device: str = "cpu", calls: int = 1) -> float:
    """Seconds of one call, the mean of so many; a GPU is waited for before and after."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def measure(
    steps: dict[str, Callable[[], object]],
    rounds: int,
    workload: Workload,
    progress: Progress,
    found: dict[str, list[float]],
    after_round: Callable[[], object] = lambda: None,
) -> None:
    """Add to `found` the seconds of each and, under "rate", the device's rate, round by round.

    One round before that counts for nothing. `after_round` is called when `found` has another round. Of `progress` each
    call is a step of its name, and each round one named "rate".
    """
    device, calls = workload.device, CALLS[workload.device]
    found.update({name: [] for name in (*steps, "rate")})
    for number in range(rounds + 1):
        seconds = {}
        for name, step in steps.items():
            with progress.step(name):
                seconds[name] = timed(step, device, calls)
        with progress.step("rate"):
            seconds["rate"] = rates(workload.dtype, device)
        if number:
            for name, value in seconds.items():
                found[name].append(value)
            after_round()


def _attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    """Both products of causal attention, over half of the matrix; shapes (batch, heads, time, width)."""
    batch, heads, time_q, width = query
    return 2 * batch * heads * time_q * key[-2] * (width + value[-1]) // 2


def _attention_backward(
    _: list[int], query: list[int], key: list[int], value: list[int], *__: object, **___: object
) -> int:
    """Five products for the forward pass's two."""
    return _attention(query, key, value) * 5 // 2


def _operation(name: str, of: Callable[..., int]) -> dict[Any, Callable[..., int]]:
    """The attention of that name, if this torch has it."""
    operation = getattr(torch.ops.aten, name, None)
    return {} if operation is None else {operation: of}


ATTENTION: dict[Any, Callable[..., int]] = {}
"""Operations of causal attention. torch doesn't count those of a CPU, and of a GPU's all of the matrix, not half."""
for _kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
    ATTENTION |= _operation(f"_scaled_dot_product_{_kind}", _attention)
    ATTENTION |= _operation(f"_scaled_dot_product_{_kind}_backward", _attention_backward)


def flops_of(peer: Peer) -> int:
    """Counted operations of one step's matrix products and attention; of a step after the first, which finds what that
    one kept. Compiled code is counted as it is written: what compilers make of it, a counter does not see."""
    with torch.compiler.set_stance("force_eager"):
        peer.step()
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            peer.step()
    return int(counter.get_total_flops())


def gpu_peak(name: str, workload: Workload) -> int:
    """The same as `own_peak` on a GPU, where the allocator counts it: the most that tensors take."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    peer = _with_state(name, workload)
    torch.cuda.reset_peak_memory_stats()
    peer.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _with_state(name: str, workload: Workload) -> Peer:
    """A peer whose optimizer has its state."""
    from bench_peers import PEERS  # it needs peft, which rates and times of our own step do not

    peer = PEERS[name](workload)
    for parameter in peer.trainable():
        parameter.grad = torch.zeros_like(parameter)
    peer.optimizer.step()
    peer.optimizer.zero_grad()
    return peer


def own_peak(name: str, workload: Workload) -> int:
    """Bytes that one step of a peer takes at its peak, in this process, over what libraries alone take.

    The optimizer has its state before; what making the model took beside it is not counted.
    """
    before = resident_bytes()
    peer = _with_state(name, workload)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    peer.step()
    return resident_bytes(peak=True) - before


def peak_of(name: str, workload: Workload, threads: int) -> float:
    """`own_peak` of a peer in a process that does nothing else; on a GPU `gpu_peak`, in this one."""
    if workload.device == "cuda":
        return float(gpu_peak(name, workload))
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
