"""Findings as a table, the worst first."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from revpatch.doctor.finding import Finding

_ORDER = ("red", "yellow", "green")


def print_findings(hosts: dict[str, list[Finding]], console: Console) -> None:
    """One table a host."""
    for host, findings in hosts.items():
        table = Table(title=Text(host), title_justify="left")
        for column in ("", "check", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for finding in sorted(findings, key=lambda each: _ORDER.index(each.colour)):
            table.add_row(
                Text(finding.colour, style=f"bold {finding.colour}"),
                Text(finding.check),
                Text(finding.found),
                Text(finding.advice),
            )
        console.print(table)
