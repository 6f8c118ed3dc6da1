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
def ledger_verify(
    run: RunArgument,
    removal: Annotated[
        bool,
        typer.Option("--removal", help="Prove too that the newest patch leaves no trace; needs the base."),
    ] = False,
    base: Annotated[str | None, typer.Option(help="Base model for --removal; default: as the patch names it.")] = None,
) -> None:
    """Check the journal's hash chain and every entry's sha256."""
    from revpatch.ledger.show import print_verify

    if not print_verify(run, console):
        raise typer.Exit(1)
    if removal:
        from revpatch.surgery.removal import prove_removal
        from revpatch.surgery.show import print_removal

        report = prove_removal(str(run), base)
        print_removal(report, console)
        if not report.ok:
            raise typer.Exit(1)
