"""`revpatch ledger ...`: a run's history, read and worked on."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from revpatch.monitoring.terminal import console, say

app = typer.Typer(no_args_is_help=True)

RunArgument = Annotated[Path, typer.Argument(help="Folder of the run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]


@app.callback()
def common(context: typer.Context) -> None:
    """A run's history: read it, verify it, compare, restore and prune its patches."""
    # A long history is many small objects without cycles: looking for these takes a quarter of the time.
    if gc.isenabled():
        gc.disable()
        context.call_on_close(gc.enable)


def _print_json(value: Any) -> None:
    """`value` is plain, as `ledger.plain` defines it."""
    from revpatch.ledger.paint import Painter

    Painter(console).print([json.dumps(value, allow_nan=False)])


@app.command("log")
def ledger_log(run: RunArgument, as_json: JsonOption = False) -> None:
    """List what happened in a run: entries, probes against their tolerance, rollbacks and why, commits."""
    from revpatch.ledger.show import print_log

    if not as_json:
        print_log(run, console)
        return
    from revpatch.ledger.history import JOURNAL_NAME
    from revpatch.ledger.journal import Journal
    from revpatch.ledger.log import states_of

    journal = Journal(run / "ledger" / JOURNAL_NAME, readonly=True)
    events = journal.records()
    told = [{**event, "state": state} for event, state in zip(events, states_of(events), strict=True)]
    _print_json({"run": str(run), "head": journal.head, "events": told})


@app.command("verify")
def ledger_verify(
    run: RunArgument,
    head: Annotated[
        str | None, typer.Option(help="A head of the journal that was noted earlier: it must still be part of it.")
    ] = None,
    hash_files: Annotated[
        bool, typer.Option("--hash/--no-hash", help="Hash every file, or look only for its size.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Check the journal's hash chain, every entry's sha256, and what lies beside them; exit code 1 if there is
    anything wrong."""
    from revpatch.ledger.audit import verify
    from revpatch.ledger.show import print_verdict

    report = verify(run, head, hash_files)
    if as_json:
        _print_json({"ok": report.ok, **asdict(report), "directory": str(report.directory)})
    else:
        print_verdict(report, console)
    if not report.ok:
        raise typer.Exit(1)
