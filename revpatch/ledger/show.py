"""A ledger printed for people: its log as a table, its verification as a verdict with what to do."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from revpatch.ledger.audit import LogRow, ProbeReading, log_rows, verify

_COLOURS = {"commit": "green", "rollback": "red", "orphan": "yellow", "torn": "yellow"}
_SHORT_SHA256 = 12


def print_log(run: Path, console: Console) -> None:
    """Prints every event of the run in `run`, oldest first. Raises JournalError for a damaged journal."""
    table = Table(title=f"ledger of {escape(str(run))}", title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("time (UTC)", no_wrap=True)
    table.add_column("phase")
    table.add_column("what", no_wrap=True)
    table.add_column("step", justify="right")
    table.add_column("probes: nats per token (rise / tolerance)")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("sha256", no_wrap=True)
    table.add_column("note", overflow="fold")
    for row in log_rows(run):
        table.add_row(*_cells(row), style=_COLOURS.get(row.kind or row.event))
    console.print(table)


def print_verify(run: Path, console: Console, expected_head: str | None = None) -> bool:
    """Verifies the ledger of the run in `run`, prints what was found, and returns whether all is well."""
    report = verify(run, expected_head)
    for problem in report.problems:
        console.print(f"[red]✗[/] [bold]{escape(problem.where)}[/]: {escape(problem.what)}", highlight=False)
        console.print(f"  {escape(problem.advice)}", highlight=False)
    looked_at = (
        f"{report.events} events, {report.entries} entries, {_size(report.bytes_hashed)} hashed in "
        f"{escape(str(report.directory))}"
    )
    if report.ok:
        console.print(f"[green]✓[/] the chain holds and every file is as recorded: {looked_at}", highlight=False)
        console.print(f"  head of the journal: {report.head}", highlight=False)
    else:
        console.print(f"[red]{len(report.problems)} problem(s)[/]: {looked_at}", highlight=False)
    return report.ok


def _cells(row: LogRow) -> tuple[str, ...]:
    return (
        str(row.seq),
        row.time[:19].replace("T", " "),
        escape(row.phase),
        escape(f"{row.kind} {row.event}".strip()),
        "" if row.step is None else str(row.step),
        "\n".join(_probe(probe) for probe in row.probes),
        "" if row.bytes is None else _size(row.bytes),
        row.sha256[:_SHORT_SHA256],
        escape(row.note),
    )


def _probe(probe: ProbeReading) -> str:
    text = f"{escape(probe.name)} {'?' if probe.loss is None else f'{probe.loss:.3f}'}"
    if probe.rise is None:
        return text
    limit = "" if probe.tolerance is None else f" / {probe.tolerance:g}"
    # Not "greater than": a rise that is NaN is too high as well.
    high = probe.tolerance is not None and not probe.rise <= probe.tolerance
    change = f"({probe.rise:+.3f}{limit})"
    return f"{text} [red]{change}[/]" if high else f"{text} {change}"


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"
