"""What the doctor looks at between ranks: the launcher's variables, and an all-reduce of the size of a patch.

python -m revpatch.doctor.ranks      # one rank; torchrun's variables say which
"""

from __future__ import annotations

import ipaddress
import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
import torch.distributed as dist

from revpatch.distributed import NAMES, Launch, read_launch
from revpatch.distributed.ranks import process_group
from revpatch.doctor.checks import Finding

_RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
"""Where launchers say how many ranks they start on a machine: torchrun, deepspeed, Slurm."""


def under_launcher(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher started this process, and its ranks are to be looked at together."""
    try:
        return read_launch(environment).launcher != "none"
    except ValueError:
        return True


def launcher(environment: Mapping[str, str]) -> Finding:
    """Judge the variables of a process, as `read_launch` reads them."""
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
        if wrong := _unreachable(environment, launch):
            return Finding("launcher", "red", found, wrong)
    if launch.warning is not None:
        return Finding("launcher", "yellow", found, launch.warning)
    return Finding("launcher", "green", found)


def _unreachable(environment: Mapping[str, str], launch: Launch) -> str | None:
    """Return what to do about a name that other machines can't be reached by, or can't reach this one by."""
    try:
        loopback = _loopback(launch.address)
    except OSError as error:
        return f"this machine can't find {launch.address} ({error}): use its IP address, or mend /etc/hosts or the DNS"
    here = (int(environment[name]) for name in _RANKS_HERE if environment.get(name, "").isdigit())
    elsewhere = launch.world - next(here, launch.world)
    if elsewhere <= 0:
        return None
    if loopback:
        return (
            f"{elsewhere} ranks are on other machines, which can't reach this {launch.address}, which is {loopback} "
            "here: name the host by an address of the network, or mend /etc/hosts"
        )
    name = socket.gethostname()
    with suppress(OSError):  # gloo asks the system for a network card where the name is not found
        if "GLOO_SOCKET_IFNAME" not in environment and (loopback := _loopback(name)):
            return (
                f"this machine takes its own name {name} for {loopback}, and gloo would listen there: mend /etc/hosts, "
                "or name the network card with GLOO_SOCKET_IFNAME"
            )
    return None


def _loopback(host: str) -> str:
    """Return the IP addresses of a host if only the host itself can use them, else nothing."""
    found = sorted({str(each[4][0]).split("%")[0] for each in socket.getaddrinfo(host, None)})
    return ", ".join(found) if all(ipaddress.ip_address(each).is_loopback for each in found) else ""


BYTES = 16 * 2**20
ROUNDS = 5
SLOW = {"nccl": 5.0, "gloo": 0.1}
"""Bus bandwidth in 10⁹ bytes/s below which a step is likely to wait: PCIe has 10 or more, a 1 Gbit/s network 0.12."""
_MARK = "revpatch-all-reduce "
"""How a rank's line with a finding begins: nccl writes on standard output too (NCCL_DEBUG=INFO)."""


def measure(device: torch.device) -> Finding:
    """Measure an all-reduce over the default group; all ranks call this.

    The bus bandwidth is 2(n − 1)/n · bytes / median seconds.
    """
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
    return judge_bandwidth(
        2 * (world - 1) / world * BYTES / sorted(times[1:])[ROUNDS // 2] / 1e9, dist.get_backend(), world
    )


def judge_bandwidth(bandwidth: float, backend: str, ranks: int) -> Finding:
    """Judge a bandwidth, in 10⁹ bytes/s, by what its backend usually reaches."""
    found = f"{bandwidth:.2f} GB/s between {ranks} ranks, {backend}, {BYTES // 2**20} MiB"
    if bandwidth < SLOW[backend]:
        name = backend.upper()
        advice = f"{name}_SOCKET_IFNAME may name the wrong network; NCCL_DEBUG=INFO shows what is used"
        return Finding("all-reduce", "yellow", found, advice)
    return Finding("all-reduce", "green", found)


def failed(error: Exception | str) -> Finding:
    """Return the finding of ranks that could not meet."""
    advice = (
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network, the port must not be blocked, and `hostname` must "
        "resolve to an address that the others reach"
    )
    return Finding("all-reduce", "red", str(error).strip().splitlines()[0][:300], advice)


def between_local_ranks(ranks: int, program: Sequence[str] = ("-m", __name__), timeout: float = 120.0) -> Finding:
    """Have torchrun start ranks on this machine, and let them measure.

    Args:
        ranks: how many.
        program: what each of them runs.
        timeout: seconds.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, "--nproc-per-node", str(ranks), *program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        said = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its ranks
        process.communicate()
        return failed(f"{ranks} ranks on this machine did not meet within {timeout:g} s")
    for line in said.splitlines():
        if line.startswith(_MARK):
            return Finding(**json.loads(line.removeprefix(_MARK)))
    return failed(f"{ranks} ranks on this machine ended without a figure: torchrun exits with {process.returncode}")


def main() -> None:
    """Be one of these ranks: print the finding, rank 0's or that of the rank that fails."""
    launch = Launch.from_environment()
    try:
        device = launch.device()
        with process_group(launch, device, timeout_minutes=1):
            finding = measure(device)
    except (RuntimeError, ConnectionError, ValueError) as error:
        finding = failed(error)
    if launch.rank == 0 or finding.colour == "red":
        sys.stdout.write(f"\n{_MARK}{json.dumps(finding.as_dict())}\n")
    sys.exit(int(finding.colour == "red"))


if __name__ == "__main__":
    main()
