"""The command line: `revpatch train | generate | probe | report | doctor | shards ... | ledger ...`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from revpatch import doctor_cli, ledger_cli, report_cli, shards_cli, surgery_cli
from revpatch.cli_errors import EXIT_REFUSED, tell
from revpatch.cli_options import load_config_once
from revpatch.cores import keep_threads_to_quota
from revpatch.generate_cli import generate
from revpatch.home import ensure_home
from revpatch.monitoring import streams
from revpatch.monitoring.doing import doing
from revpatch.monitoring.terminal import console, quiet_libraries, say


class _Commands(TyperGroup):
    """All commands. Takes Ctrl-C and errors of the system before typer does, which would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, OSError) as error:
            code = tell(error)
            eval("0")  # Python forgets a Ctrl-C that hit it in such code; else it would die of it, in spite of the code
            sys.exit(code)


app = typer.Typer(
    cls=_Commands,
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

    if overwrite and not fresh:
        raise ValueError("--overwrite deletes the run in output_dir to begin another: it needs --fresh beside it")
    streams.never_wait()
    loaded = load_config_once(config, overrides)
    with doing("loading torch and transformers", say, os.environ.get("RANK", "0") == "0"):
        from revpatch.training.run import train as run
    outcome = run(loaded, fresh, overwrite)
    directory = outcome.directory
    if outcome.interrupted:
        raise typer.Exit(EXIT_CODE)
    if os.environ.get("RANK", "0") == "0":
        print_summary(directory, console)
        say(f"Ledger, log and TensorBoard files are in {directory}")


def main() -> None:
    """Runs the command line; a user's mistake is one message and exit code 2, and what else ends it exits with 1.

    What a command prints may get lost (`| head`, a closed terminal): it is done all the same. Where the output is what
    was asked for and can't be written, as on a full disk, that is said, and the exit code is 2.
    """
    streams.make_steady()
    code: Any = 0
    try:
        keep_threads_to_quota()
        ensure_home()
        quiet_libraries()
        app()
    except SystemExit as end:
        code = end.code
    except Exception as error:
        code = tell(error)
    streams.flush()
    if code in (0, None) and (lost := streams.unwritten()) is not None and not _only_progress(sys.argv[1:]):
        sys.stderr.write(f"revpatch: standard output: {lost.strerror}: what the command printed is not whole there\n")
        code = EXIT_REFUSED
    sys.exit(code)


def _only_progress(arguments: list[str]) -> bool:
    """Whether what the command makes is in its folder, and its lines only say how far it is."""
    named = [word for word in arguments if not word.startswith("-")]
    return named[:1] == ["train"] or named[:2] == ["shards", "build"]


if __name__ == "__main__":
    main()
