"""The launcher's variables: whether they fit one another and this machine."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping
from typing import Any

from revpatch.doctor.finding import Finding
from revpatch.training.launcher_variables import NAMES, Launch, read_launch

_RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
"""Where launchers say how many ranks they start on a machine: torchrun, deepspeed, Slurm."""


def under_launcher(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher started this process, and its ranks are to be looked at together."""
    try:
        return read_launch(environment).launcher != "none"
    except ValueError:
        return True


def launcher(environment: Mapping[str, str], resolve: Callable[..., Any] = socket.getaddrinfo) -> Finding:
    """Judges the variables of a process, as `read_launch` reads them."""
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
        if wrong := _unreachable(environment, launch, resolve):
            return Finding("launcher", "red", found, wrong)
    if launch.warning is not None:
        return Finding("launcher", "yellow", found, launch.warning)
    return Finding("launcher", "green", found)


def _unreachable(environment: Mapping[str, str], launch: Launch, resolve: Callable[..., Any]) -> str | None:
    """What to do about a name that other machines can't be reached by, or can't reach this one by."""
    address, world = launch.address, launch.world
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
