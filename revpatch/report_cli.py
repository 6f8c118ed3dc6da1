"""`revpatch report RUN`: what became of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from revpatch.cli_options import JsonOption, RunArgument, print_json
from revpatch.monitoring.terminal import console, say

PAGE_NAME = "report.html"


def report(
    run: RunArgument,
    html: Annotated[bool, typer.Option("--html", help=f"Write a page too, RUN/{PAGE_NAME}.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a run by its folder alone: checklist, every corpus after every phase, forgetting and transfer."""
    from revpatch.report.contents import report_of
    from revpatch.report.page import page_of
    from revpatch.report.show import print_report

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
