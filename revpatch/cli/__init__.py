"""The command line: `revpatch train | generate | probe | report | doctor | shards ... | ledger ...`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from revpatch import terminal as streams
from revpatch.cli import ledger as ledger_cli
from revpatch.cli import shards as shards_cli
from revpatch.cli.errors import EXIT_REFUSED, tell
from revpatch.cli.generate import generate
from revpatch.cli.options import JsonOption, RunArgument, load_config_once, print_json
from revpatch.distributed import keep_threads_to_quota
from revpatch.terminal import console, doing, quiet_libraries, say


def ensure_home() -> None:
    """Sets HOME, for this process and those that it starts, to a folder among the temporary ones if there is no home,
    and says so; where there is one that can't be written, moves triton's cache alone, which nobody needs to keep.

    Comes before anything is imported that looks for its cache. Raises OSError if there is no place for it either.
    """
    home = _home()
    if home is None:
        home = _private_folder()
        os.environ["HOME"] = str(home)
        os.environ.setdefault("USER", str(os.geteuid()))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(
                f"revpatch: user {os.geteuid()} has no home folder, so caches go to {home}: set HOME, or HF_HOME for "
                "that of the hub, to keep them elsewhere\n"
            )
    elif not os.access(home, os.W_OK):
        os.environ.setdefault("TRITON_CACHE_DIR", str(_private_folder() / ".triton"))


def _home() -> Path | None:
    if os.environ.get("HOME") == "":  # which Python takes for the root of all files
        return None
    try:
        home = Path.home()
    except (RuntimeError, KeyError):
        return None
    return home if home.is_absolute() else None


def _private_folder() -> Path:
    """This user's own folder, in which nobody else can put files."""
    folder = Path(tempfile.gettempdir()) / f"revpatch-home-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        return Path(tempfile.mkdtemp(prefix="revpatch-home-"))
    return folder


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A config, whose folders are looked at; default: runs and the usual cache.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look at versions, GPUs and their peer access, all-reduce, shared memory, disks and caches; exits with 1 if
    anything is red. Under a launcher, all machines are looked at together."""
    from revpatch.doctor import Places, examine, print_findings
    from revpatch.doctor.checks import worst

    examined = examine(Places() if config is None else Places.of(load_config_once(config)))
    hosts = examined.hosts
    if examined.told:
        if as_json:
            print_json({host: [each.as_dict() for each in findings] for host, findings in hosts.items()})
        else:
            print_findings(hosts, console)
    if worst(each for findings in hosts.values() for each in findings) == "red":
        raise typer.Exit(1)


PAGE_NAME = "report.html"


def report(
    run: RunArgument,
    html: Annotated[bool, typer.Option("--html", help=f"Write a page too, RUN/{PAGE_NAME}.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a run by its folder alone: checklist, every corpus after every phase, forgetting and transfer."""
    from revpatch.report import print_report, report_of
    from revpatch.report.page import page_of

    found = report_of(run)
    if as_json:
        print_json(found.as_fields())
    else:
        print_report(found, console)
    file = out or (run / PAGE_NAME if html else None)
    if file is not None:
        file.write_text(page_of(found), encoding="utf-8")
        if not as_json:
            say(f"written: {file}")


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
app.command()(ledger_cli.probe)
app.command()(generate)
app.command()(doctor)
app.command()(report)


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
    """Train every phase of a config, resuming where its run stopped; start it with deepspeed, torchrun, accelerate
    launch or plain python.

    Told to stop by SIGTERM or SIGUSR1, it writes a snapshot and exits with 75.
    """
    from revpatch.distributed.signals import EXIT_CODE
    from revpatch.monitoring.record import print_summary

    if overwrite and not fresh:
        raise ValueError("--overwrite deletes the run in output_dir to begin another: it needs --fresh beside it")
    streams.never_wait()
    loaded = load_config_once(config, overrides)
    with doing("loading torch and transformers", say, os.environ.get("RANK", "0") == "0"):
        from revpatch.train.run import train_run
    outcome = train_run(loaded, fresh, overwrite)
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
    """Return whether what the command makes is in its folder, and its lines only say how far it is."""
    named = [word for word in arguments if not word.startswith("-")]
    return named[:1] == ["train"] or named[:2] == ["shards", "build"]


if __name__ == "__main__":
    main()
