"""The command line: `revpatch train | generate | probe | report | doctor | shards ... | ledger ...`."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from revpatch import doctor_cli, ledger_cli, report_cli, shards_cli, surgery_cli
from revpatch.cli_options import load_config_once
from revpatch.generate_cli import generate
from revpatch.monitoring.terminal import console, quiet_libraries, say

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(shards_cli.app, name="shards")
app.add_typer(ledger_cli.app, name="ledger")
surgery_cli.add_to(app, ledger_cli.app)
app.command()(generate)
doctor_cli.add_to(app)
app.command()(report_cli.report)


@app.callback()
def common(local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0) -> None:
    """Teach a frozen causal language model new corpora as a small removable patch."""
    # The deepspeed launcher puts --local_rank first; LOCAL_RANK, which it sets too, is what is used.


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML or JSON config.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, over what the config says.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin a new run; refused where there is one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --fresh: delete the run that is there.")] = False,
) -> None:
    """Train every phase of a config, going on where its run stands; start it with deepspeed, torchrun, accelerate
    launch or plain python.

    Told to stop by SIGTERM or SIGUSR1, it writes a snapshot and exits with 75.
    """
    from revpatch.monitoring.summary import print_summary
    from revpatch.training.interrupt import EXIT_CODE
    from revpatch.training.run import train as run

    if overwrite and not fresh:
        raise ValueError("--overwrite deletes the run in output_dir to begin another: it needs --fresh beside it")
    outcome = run(load_config_once(config, overrides), fresh, overwrite)
    directory = outcome.directory
    if outcome.interrupted:
        raise typer.Exit(EXIT_CODE)
    if os.environ.get("RANK", "0") == "0":
        print_summary(directory, console)
        say(f"Ledger, log and TensorBoard files are in {directory}")


def main() -> None:
    """Runs the command line; a user's mistake is one message, with the rank that met it, and exit code 2.

    REVPATCH_TRACEBACK=1 in the environment shows where the error came from.
    """
    quiet_libraries()
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("REVPATCH_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f", rank {rank} on {socket.gethostname()}"
        sys.stderr.write(f"revpatch{where}: {error}\n")
        sys.exit(1 if isinstance(error, ConnectionError) else 2)


if __name__ == "__main__":
    main()
