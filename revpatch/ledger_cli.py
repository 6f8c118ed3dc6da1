"""`revpatch ledger ...`: a run's history, read and worked on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from revpatch.monitoring.terminal import console

app = typer.Typer(help="Read a run's ledger.", no_args_is_help=True)

RunArgument = Annotated[Path, typer.Argument(help="Folder of the run.")]


@app.command("log")
def ledger_log(run: RunArgument) -> None:
    """List what happened in a run: entries, probes, rollbacks, commits."""
    from revpatch.ledger.show import print_log

    print_log(run, console)


@app.command("verify")
def ledger_verify(run: RunArgument) -> None:
    """Check the journal's hash chain and every entry's sha256."""
    from revpatch.ledger.show import print_verify

    if not print_verify(run, console):
        raise typer.Exit(1)
