"""How fast ranks sum tensors: an all-reduce of the size of a patch, by nccl on GPUs and gloo on CPUs.

python -m revpatch.doctor.bandwidth      # one rank; the launcher's variables say which
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from tempfile import TemporaryFile
from typing import IO

import torch
import torch.distributed as dist

from revpatch.distributed import Launch
from revpatch.distributed.ranks import process_group
from revpatch.doctor.checks import Finding

BYTES = 16 * 2**20
ROUNDS = 5
_MEASURED = "revpatch-bandwidth"
"""How the line of rank 0 begins."""
SLOW = {"nccl": 5.0, "gloo": 0.1}
"""Bus bandwidth in 10⁹ bytes/s below which a step is likely to wait: PCIe has 10 or more, a 1 Gbit/s network 0.12."""


def measure(device: torch.device) -> float:
    """Bus bandwidth of an all-reduce over the default group in 10⁹ bytes/s: 2(n − 1)/n · bytes / median seconds."""
    tensor = torch.ones(BYTES // 4, device=device)
    times = []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    world = dist.get_world_size()
    return 2 * (world - 1) / world * BYTES / sorted(times[1:])[ROUNDS // 2] / 1e9


def judge_bandwidth(bandwidth: float, backend: str, ranks: int) -> Finding:
    """Whether that is what the backend usually reaches."""
    found = f"{bandwidth:.2f} GB/s between {ranks} ranks, {backend}, {BYTES // 2**20} MiB"
    if bandwidth < SLOW[backend]:
        name = backend.upper()
        advice = f"{name}_SOCKET_IFNAME may name the wrong network; NCCL_DEBUG=INFO shows what is used"
        return Finding("all-reduce", "yellow", found, advice)
    return Finding("all-reduce", "green", found)


def failed(reason: str) -> Finding:
    """The ranks could not meet."""
    advice = (
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network, the port must not be blocked, and `hostname` must "
        "resolve to an address that the others reach"
    )
    return Finding("all-reduce", "red", reason, advice)


def between_local_ranks(ranks: int, command: Sequence[str], timeout: float = 120.0) -> Finding:
    """Starts ranks on this machine and has them measure.

    Args:
        ranks: how many.
        command: what each of them is.
        timeout: seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as files:
        # Files: a pipe that nobody reads while all are waited for may fill up (NCCL_DEBUG=INFO).
        out, err = ([files.enter_context(TemporaryFile("w+")) for _ in range(ranks)] for _ in range(2))
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=out[rank],
                stderr=err[rank],
            )
            for rank in range(ranks)
        ]
        try:
            wrong = _first_to_fail(processes, timeout)
        except TimeoutError:
            return failed(f"{ranks} ranks on this machine did not meet within {timeout:g} s")
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if wrong is not None:
            return failed(f"ranks on this machine: {(_said(err[wrong]) or ['ended without a word'])[-1][:300]}")
        # nccl writes on standard output too, before and after (NCCL_DEBUG=INFO).
        said = [line.split()[1:] for line in _said(out[0]) if line.startswith(f"{_MEASURED} ")]
    if not said:
        return failed("ranks on this machine ended without a figure")
    bandwidth, backend = said[0]
    return judge_bandwidth(float(bandwidth), backend, ranks)


def _first_to_fail(processes: Sequence[subprocess.Popen[bytes]], timeout: float) -> int | None:
    """Waits for all, or for the first that ends with an error: which one; the others may wait for it for long.

    Raises:
        TimeoutError: not all have ended.
    """
    until = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        wrong = [index for index, code in enumerate(codes) if code]
        if wrong or None not in codes:
            return wrong[0] if wrong else None
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.02)


def _said(file: IO[str]) -> list[str]:
    """The lines that were written into a file by a process."""
    file.seek(0)
    return file.read().strip().splitlines()


def main() -> None:
    """One of the ranks: rank 0 prints the bandwidth and the backend."""
    launch = Launch.from_environment()
    device = launch.device()
    with process_group(launch, device, timeout_minutes=1):
        bandwidth = measure(device)
        if launch.rank == 0:
            sys.stdout.write(f"\n{_MEASURED} {bandwidth} {dist.get_backend()}\n")


if __name__ == "__main__":
    main()
