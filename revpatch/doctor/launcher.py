"""The launcher's variables: whether they fit one another and this machine."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping
from typing import Any

from revpatch.doctor.finding import Finding
from revpatch.training.launch import Launch

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
"""Where launchers say how many ranks they start on a machine: torchrun, deepspeed, Slurm."""


def under_launcher(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process."""
    return bool({"RANK", "WORLD_SIZE"} & environment.keys())


def launcher(environment: Mapping[str, str], resolve: Callable[..., Any] = socket.getaddrinfo) -> Finding:
    """Judges the variables of this process; `os.environ` is what `Launch` reads, so pass that."""
    set_ = {name: environment[name] for name in NAMES if name in environment}
    found = ", ".join(f"{name}={value}" for name, value in set_.items())
    if not under_launcher(environment):
        if "SLURM_PROCID" in environment and (started := environment.get("SLURM_NTASKS", "1")) != "1":
            words = f"SLURM_PROCID={environment['SLURM_PROCID']}, SLURM_NTASKS={started}, but no RANK"
            advice = "each task would train by itself: start with launch/slurm.sbatch"
            return Finding("launcher", "yellow", words, advice)
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
    if wrong := _unreachable(environment, launch.world, resolve):
        return Finding("launcher", "red", found, wrong)
    tasks = environment.get("SLURM_NTASKS")
    if "SLURM_PROCID" in environment and tasks not in (None, str(launch.world)):
        advice = "one task a rank: start with launch/slurm.sbatch"
        return Finding("launcher", "yellow", f"{found}, SLURM_NTASKS={tasks}", advice)
    return Finding("launcher", "green", found)


def _unreachable(environment: Mapping[str, str], world: int, resolve: Callable[..., Any]) -> str | None:
    """What to do about a name that other machines can't be reached by, or can't reach this one by."""
    address = environment["MASTER_ADDR"]
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
