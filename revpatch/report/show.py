"""The report in a terminal: the checklist, the matrix, the measures, what happened, samples, environment; no curves."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from revpatch.monitoring.heat_map import colours, ink_on
from revpatch.report.checks import VERDICTS
from revpatch.report.contents import MEASURES, Report
from revpatch.report.matrix import Matrix

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
    if report.matrix is not None:
        console.print(_matrix(report.matrix))
        console.print(Text(f"intervals of {report.run.confidence:.0%}", "dim"))
        for name, meaning in MEASURES.items():
            found = report.measures.get(name)
            figure = "no corpus to take it from" if found is None else str(found)
            console.print(Text.assemble((f"{name}  ", "bold"), figure, (f"  {meaning}", "dim")), soft_wrap=True)
    for happening in report.run.happenings:
        words = f"{happening.time}  step {happening.step}  {happening.words}"
        console.print(Text(words, "red" if happening.kind == "rollback" else ""), soft_wrap=True)
    for after, texts in report.run.samples:
        for sample in texts:
            parts = ((f"sample, {after}: ", "dim"), (sample.prompt, "bold"), sample.text)
            console.print(Text.assemble(*parts), soft_wrap=True)
    for name, value in report.run.environment.items():
        console.print(Text.assemble((f"{name}  ", "dim"), value), soft_wrap=True)


def _matrix(matrix: Matrix) -> Table:
    """Each column coloured from its worst to its best, as on the page; bold: the phase that teaches it."""
    table = Table("after", title="R = −loss, nats per token", title_justify="left")
    for name in matrix.sets:
        table.add_column(Text(name), justify="right")
    for i, (after, values) in enumerate(zip(matrix.rows, matrix.values, strict=True)):
        cells = []
        for value, share, taught in zip(values, matrix.shares[i], matrix.taught_by, strict=True):
            red, green, blue = (int(channel) for channel in colours(np.asarray(share)))
            style = f"{ink_on(red, green, blue)} on #{red:02x}{green:02x}{blue:02x}"
            cells.append(Text(f"{value:.3f}", f"bold {style}" if taught == i > 0 else style))
        table.add_row(Text(after), *cells)
    return table


def _line(passed: bool | None, words: str) -> Text:
    return Text.assemble((f"{VERDICTS[passed]:<11}", _COLOURS[passed]), words)
