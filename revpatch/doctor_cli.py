"""`revpatch doctor`: whether this machine, and under a launcher all of them, are fit to train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from revpatch.cli_options import JsonOption, load_config_once, print_json
from revpatch.monitoring.terminal import console


def add_to(app: typer.Typer) -> None:
    """Puts the command among the others."""
    app.command()(doctor)


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A config, whose folders are looked at; default: runs and the usual cache.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look at versions, GPUs and links, all-reduce, shared memory, disks, caches, locks, limits; exits with 1 if
    anything is red. Under a launcher, all machines are looked at together."""
    from revpatch.doctor.examine import Places, examine
    from revpatch.doctor.finding import worst
    from revpatch.doctor.show import print_findings

    examined = examine(Places() if config is None else Places.of(load_config_once(config)))
    hosts = examined.hosts
    if examined.told:
        if as_json:
            print_json({host: [each.as_dict() for each in findings] for host, findings in hosts.items()})
        else:
            print_findings(hosts, console)
    if worst(each for findings in hosts.values() for each in findings) == "red":
        raise typer.Exit(1)
