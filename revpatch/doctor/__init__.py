"""`revpatch doctor`: looks at this machine, its packages and its ranks; under a launcher, at all machines together."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table
from rich.text import Text

from revpatch.config import Config
from revpatch.distributed import Launch, rank_and_local_rank
from revpatch.distributed.ranks import bfloat16_is_slow, process_group
from revpatch.doctor import checks, ranks
from revpatch.doctor.checks import Finding
from revpatch.train.first_use import needs_building


@dataclass(frozen=True)
class Places:
    """Folders that a run writes to, and how much they may come to hold, in 10⁹ bytes."""

    output: Path = Path("runs")
    cache: Path | None = Path("~/.cache/revpatch/shards")
    cache_gb: float = 20.0
    built: Path | None = None
    """Where the shards of raw sources are kept."""

    @classmethod
    def of(cls, config: Config) -> Places:
        """Return those that a config names."""
        cache = config.stream.shard_cache
        return cls(
            Path(config.output_dir),
            Path(cache) if cache else None,
            config.stream.shard_cache_gb,
            Path(config.build.folder) if config.replays_own_text or needs_building(config) else None,
        )


@dataclass(frozen=True)
class Examined:
    """Findings by host name: those of all hosts if the ranks met, else what this one has found by itself."""

    hosts: dict[str, list[Finding]]
    told: bool = True
    """This rank is to say them: rank 0 if the ranks met; if not, the first of each machine, and whichever has
    met what keeps it from joining."""


def examine(places: Places) -> Examined:
    """Look at everything; under a launcher every rank calls this."""
    host, findings = socket.gethostname(), [ranks.launcher(os.environ)]
    if not ranks.under_launcher(os.environ):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 2
        findings += this_machine(places)
        if count > 1:
            findings.append(ranks.between_local_ranks(count))
        return Examined({host: findings})
    if rank_and_local_rank()[1] == 0:
        findings += this_machine(places)
    if findings[0].colour == "red":
        return Examined({host: findings})
    launch = Launch.from_environment()
    try:
        device = launch.device()
    except ValueError as error:
        advice = "start as many ranks on this machine as it has GPUs, or fewer"
        return Examined({host: [*findings, Finding("ranks", "red", str(error), advice)]})
    try:
        return Examined(_with_the_others(launch, device, findings), told=launch.rank == 0)
    except (RuntimeError, ConnectionError, ValueError) as error:
        return Examined({host: [*findings, ranks.failed(error)]}, told=launch.local_rank == 0)


def this_machine(places: Places) -> list[Finding]:
    """Return what needs no other rank."""
    on_gpu = torch.cuda.is_available()
    usable = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    slow = not torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else bfloat16_is_slow()
    findings = [
        checks.versions(),
        checks.gpus(usable),
        checks.peer_access(len(usable)),
        checks.bfloat16(slow, on_gpu),
        checks.shared_memory(),
        checks.disk("output", places.output, 10.0),
        checks.hub_cache(Path(constants.HF_HUB_CACHE), constants.HF_HUB_OFFLINE),
    ]
    if places.cache is not None:
        findings.append(checks.disk("shard cache", places.cache.expanduser(), places.cache_gb))
    if places.built is not None:
        findings.append(checks.disk("built shards", places.built, 10.0))
    return findings


def _with_the_others(launch: Launch, device: torch.device, findings: list[Finding]) -> dict[str, list[Finding]]:
    with process_group(launch, device, timeout_minutes=2) as peers:
        measured = [ranks.measure(device)] if launch.world > 1 else []
        gathered = peers.gather(
            (socket.gethostname(), launch.local_rank, findings + (measured if launch.rank == 0 else []))
        )
    found: dict[str, list[Finding]] = {}
    for host, local_rank, theirs in gathered:
        # The variables of ranks beside the first are told where they are not in order.
        kept = theirs if local_rank == 0 else [each for each in theirs if each.colour != "green"]
        found.setdefault(host, []).extend(kept)
    return found


_ORDER = ("red", "yellow", "green")


def print_findings(hosts: dict[str, list[Finding]], console: Console) -> None:
    """Print one table a host."""
    for host, findings in hosts.items():
        table = Table(title=Text(host), title_justify="left")
        for column in ("", "check", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for finding in sorted(findings, key=lambda each: _ORDER.index(each.colour)):
            table.add_row(
                Text(finding.colour, style=f"bold {finding.colour}"),
                Text(finding.check),
                Text(finding.found),
                Text(finding.advice),
            )
        console.print(table)
