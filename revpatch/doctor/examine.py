"""Everything that is looked at, on one machine or, under a launcher, on all of them."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import constants

from revpatch.config import Config
from revpatch.doctor import bandwidth, gpus, machine
from revpatch.doctor.finding import Finding
from revpatch.doctor.launcher import launcher, under_launcher
from revpatch.doctor.packages import versions
from revpatch.training.launch import Launch, bfloat16_is_slow, process_group


@dataclass(frozen=True)
class Places:
    """Folders that a run writes to, and how much they may come to hold, in 10⁹ bytes."""

    output: Path = Path("runs")
    cache: Path | None = Path("~/.cache/revpatch/shards")
    cache_gb: float = 20.0

    @classmethod
    def of(cls, config: Config) -> Places:
        """Those that a config names."""
        cache = config.stream.shard_cache
        return cls(Path(config.output_dir), Path(cache) if cache else None, config.stream.shard_cache_gb)


def examine(places: Places) -> dict[str, list[Finding]]:
    """Findings by host name. Under a launcher every rank calls this, and each gets the findings of all hosts.

    Raises:
        ConnectionError: under a launcher, another rank is gone before all have told what they found.
    """
    variables = launcher(os.environ)
    findings = [variables]
    if not under_launcher(os.environ):
        ranks = torch.cuda.device_count() if torch.cuda.is_available() else 2
        command = [sys.executable, "-m", "revpatch.doctor.bandwidth"]
        findings += this_machine(places)
        if ranks > 1:
            findings.append(bandwidth.between_local_ranks(ranks, command))
        return {socket.gethostname(): findings}
    if variables.colour == "red":
        return {socket.gethostname(): [variables, *this_machine(places)]}
    launch = Launch.from_environment()
    if launch.local_rank == 0:
        findings += this_machine(places)
    try:
        return _with_the_others(launch, findings)
    except RuntimeError as error:
        return {socket.gethostname(): [*findings, bandwidth.failed(str(error).strip().splitlines()[0][:300])]}


def this_machine(places: Places) -> list[Finding]:
    """What needs no other rank."""
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    on_gpu = torch.cuda.is_available()
    slow = not torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else bfloat16_is_slow()
    findings = [
        versions(),
        gpus.gpus(gpus.nvidia_smi("-L"), gpus.usable_gpus()),
        gpus.links(gpus.nvidia_smi("topo", "-m")),
        machine.bfloat16(slow, on_gpu),
        machine.shared_memory(),
        machine.disk("output", places.output, 10.0),
    ]
    if places.cache is not None:
        findings.append(machine.disk("shard cache", places.cache.expanduser(), places.cache_gb))
    findings += [
        machine.hub_cache(Path(constants.HF_HUB_CACHE), constants.HF_HUB_OFFLINE),
        machine.extension_locks(Path(extensions).expanduser()),
        machine.open_files(),
    ]
    return findings


def _with_the_others(launch: Launch, findings: list[Finding]) -> dict[str, list[Finding]]:
    device = launch.device()
    with process_group(launch, device, timeout_minutes=2) as peers:
        measured = bandwidth.measure(device) if launch.world > 1 else None
        if measured is not None and launch.rank == 0:
            findings = [*findings, bandwidth.judge(measured, dist.get_backend(), launch.world)]
        gathered = peers.gather((socket.gethostname(), launch.local_rank, findings))
    found: dict[str, list[Finding]] = {}
    for host, local_rank, theirs in gathered:
        # The variables of ranks beside the first are told where they are not in order.
        kept = theirs if local_rank == 0 else [each for each in theirs if each.colour != "green"]
        found.setdefault(host, []).extend(kept)
    return found
