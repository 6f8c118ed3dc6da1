"""`revpatch report RUN`: what became of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from revpatch.monitoring.terminal import console, say

PAGE_NAME = "report.html"


def report(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    html: Annotated[bool, typer.Option("--html", help=f"Write a page too, RUN/{PAGE_NAME}.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Judge a run by its folder alone: checklist, every corpus after every phase, forgetting and transfer."""
    from revpatch.report.contents import report_of
    from revpatch.report.page import page_of
    from revpatch.report.show import print_report

    found = report_of(run)
    if as_json:
        typer.echo(json.dumps(found.as_fields(), indent=1))
    else:
        print_report(found, console)
    file = out or (run / PAGE_NAME if html else None)
    if file is not None:
        file.write_text(page_of(found), encoding="utf-8")
        if not as_json:
            say(f"written: {file}")
