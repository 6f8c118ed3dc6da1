"""A ledger printed for people: its log, an event a paragraph, and its verification as a verdict with what to do.

    #3  2025-01-31 12:00:00  wikitext step 500  good entry  1.2 MB  ecd1d3ed27fd
        000_wikitext_good_step000000500.pt
        base 3.420 (+0.020 / 0.03)      held-out loss in nats per token (its rise / its tolerance)

Lines and no table: they stay readable in a narrow terminal, can be searched, and print several times as fast.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from revpatch.ledger.audit import LogRow, ProbeReading, log_rows, verify

_COLOURS = {"good": "cyan", "commit": "bold green", "rollback": "bold red", "orphan": "yellow", "torn": "yellow"}
_SHORT_SHA256 = 12


def print_log(run: Path, console: Console) -> None:
    """Prints every event of the run in `run`, oldest first. Raises JournalError for a damaged journal."""
    for row in log_rows(run):
        console.print(_paragraph(row), soft_wrap=True)


def print_verify(run: Path, console: Console, expected_head: str | None = None) -> bool:
    """Verifies the ledger of the run in `run`, prints what was found, and returns whether all is well."""
    report = verify(run, expected_head)
    for problem in report.problems:
        line = Text.assemble(("✗ ", "red"), (problem.where, "bold"), f": {problem.what}\n  {problem.advice}")
        console.print(line, soft_wrap=True)
    looked_at = (
        f"{report.events} events, {report.entries} entries, {_size(report.bytes_hashed)} hashed in {report.directory}"
    )
    if report.ok:
        verdict = Text.assemble(("✓ ", "green"), "the chain holds and every file is as recorded: ", looked_at)
        verdict.append(f"\n  head of the journal: {report.head}")
    else:
        verdict = Text.assemble((f"{len(report.problems)} problem(s)", "red"), ": ", looked_at)
    console.print(verdict, soft_wrap=True)
    return report.ok


def _paragraph(row: LogRow) -> Text:
    indent = " " * (len(f"#{row.seq}") + 2)
    text = Text.assemble((f"#{row.seq}  {row.time[:19].replace('T', ' ')}  ", "dim"))
    place = " ".join(piece for piece in (row.phase, "" if row.step is None else f"step {row.step}") if piece)
    if place:
        text.append(f"{place}  ")
    text.append(f"{row.kind} {row.event}".strip(), _COLOURS.get(row.kind or row.event, ""))
    if row.bytes is not None:
        text.append(f"  {_size(row.bytes)}")
    if row.sha256:
        text.append(f"  {row.sha256[:_SHORT_SHA256]}", "dim")
    if row.note:
        text.append(f"\n{indent}{row.note}")
    for probe in row.probes:
        _add_probe(text.append(f"\n{indent}"), probe)
    return text


def _add_probe(text: Text, probe: ProbeReading) -> None:
    text.append(f"{probe.name} {'?' if probe.loss is None else f'{probe.loss:.3f}'}")
    if probe.rise is None:
        return
    limit = "" if probe.tolerance is None else f" / {probe.tolerance:g}"
    # Not "greater than": a rise that is NaN is too high as well.
    high = probe.tolerance is not None and not probe.rise <= probe.tolerance
    text.append(" ").append(f"({probe.rise:+.3f}{limit})", "red" if high else "")


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"
