"""The report in a terminal: the checklist, the matrix, the measures, what happened."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from revpatch.report.contents import MEASURES, Report
from revpatch.report.page import VERDICTS

_COLOURS = {True: "green", False: "bold red", None: "dim"}


def print_report(report: Report, console: Console) -> None:
    """Prints it."""
    console.print(Text.assemble((report.run.directory.name, "bold"), f": {report.run.environment['state']}"))
    for check in report.checks:
        console.print(_line(check.passed, f"{check.name}: {check.figure}"), soft_wrap=True)
        for row in check.rows:
            console.print(Text("    ") + _line(row.passed, f"{row.what}: {row.figure}"), soft_wrap=True)
    if not report.checks:
        console.print(report.unjudged)
    if report.matrix is None:
        return
    table = Table("after", title="R = −loss, nats per token", title_justify="left")
    for name in report.matrix.sets:
        table.add_column(Text(name), justify="right")
    for i, (after, values) in enumerate(zip(report.matrix.rows, report.matrix.values, strict=True)):
        own = [taught == i and i > 0 for taught in report.matrix.taught_by]
        cells = (Text(f"{v:.3f}", "bold" if mine else "") for v, mine in zip(values, own, strict=True))
        table.add_row(Text(after), *cells)
    console.print(table)
    for name, meaning in MEASURES.items():
        found = report.measures.get(name)
        figure = "no corpus to take it from" if found is None else str(found)
        console.print(Text.assemble((f"{name}  ", "bold"), figure, (f"  {meaning}", "dim")), soft_wrap=True)
    for happening in report.run.happenings:
        words = f"{happening.time}  step {happening.step}  {happening.words}"
        console.print(Text(words, "red" if happening.kind == "rollback" else ""), soft_wrap=True)


def _line(passed: bool | None, words: str) -> Text:
    return Text.assemble((f"{VERDICTS[passed]:<11}", _COLOURS[passed]), words)
