"""The launcher's variables: whether they fit one another and this machine."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

from revpatch.doctor.finding import Finding
from revpatch.training.launch import Launch

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def under_launcher(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process."""
    return bool({"RANK", "WORLD_SIZE"} & environment.keys())


def launcher(environment: Mapping[str, str], resolve: Callable[..., Any] = socket.getaddrinfo) -> Finding:
    """Judges the variables of this process; `os.environ` is what `Launch` reads, so pass that."""
    set_ = {name: environment[name] for name in NAMES if name in environment}
    found = ", ".join(f"{name}={value}" for name, value in set_.items())
    if not under_launcher(environment):
        if set_:
            advice = "no launcher is meant by them, and one process is started: unset them"
            return Finding("launcher", "yellow", f"{found}, left by something else", advice)
        return Finding("launcher", "green", "none; one process")
    try:
        launch = Launch.from_environment()
    except ValueError as error:
        return Finding("launcher", "red", found, str(error))
    port = environment["MASTER_PORT"]
    if not port.isdigit() or not 0 < int(port) < 2**16:
        return Finding("launcher", "red", found, f"MASTER_PORT={port} is no port: choose one from 1024 to 65535")
    address = environment["MASTER_ADDR"]
    try:
        resolve(address, int(port))
    except OSError as error:
        advice = f"this machine can't find {address} ({error}): use its IP address, or mend /etc/hosts or the DNS"
        return Finding("launcher", "red", found, advice)
    here = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or launch.world)
    if address in _LOOPBACK and launch.world > here:
        advice = f"{launch.world - here} ranks are on other machines, which can't reach this {address}: name the host"
        return Finding("launcher", "red", found, advice)
    tasks = environment.get("SLURM_NTASKS")
    if "SLURM_PROCID" in environment and tasks not in (None, str(launch.world)):
        advice = "one task a rank: start with launch/slurm.sbatch"
        return Finding("launcher", "yellow", f"{found}, SLURM_NTASKS={tasks}", advice)
    return Finding("launcher", "green", found)
