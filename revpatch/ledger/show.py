"""A ledger printed for people: its log, an event a paragraph, and its verification as a verdict with what to do.

    #3  2025-01-31 12:00:00  wikitext step 500  good entry  1.2 MB  ecd1d3ed27fd
        000_wikitext_good_step000000500.safetensors
        base 3.420 (+0.020 / 0.03)      held-out loss in nats per token (its rise / its tolerance)

Lines and no table: they stay readable in a narrow terminal, can be searched, and print several times as fast. What no
longer counts says so: pruned, superseded, undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from revpatch.ledger.audit import VerifyReport
from revpatch.ledger.events import ProbeReading
from revpatch.ledger.history import JOURNAL_NAME, ledger_of
from revpatch.ledger.journal import Journal
from revpatch.ledger.log import AGAIN, KEPT, PRUNED, SUPERSEDED, UNDONE, LogRow, rows_of
from revpatch.ledger.paint import Painter

_COLOURS = {
    "good": "cyan",
    "commit": "bold green",
    "rollback": "bold red",
    "origin": "magenta",
    "resume": "yellow",
    "orphan": "yellow",
    "torn": "yellow",
}
_GONE = (PRUNED, SUPERSEDED, UNDONE, AGAIN)
_SHORT_SHA256 = 12


def print_log(run: Path, console: Console) -> None:
    """Prints every event of the run in `run`, oldest first, then what is kept. Raises JournalError for a damaged
    or an empty journal."""
    journal = Journal(ledger_of(run) / JOURNAL_NAME, readonly=True)
    journal.check_begun()
    events = journal.records()
    paint, kept, commit = Painter(console), [], "none yet"

    def paragraphs() -> Iterator[str]:
        nonlocal commit
        probes, lines = None, [""]
        for row in rows_of(events):
            if row.state == KEPT:
                kept.append(row)
                commit = _file(row) if row.kind == "commit" else commit
            if row.probes is not probes:
                probes, lines = row.probes, [_probe(name, reading, paint) for name, reading in row.probes.items()]
            yield _paragraph(row, lines, paint)

    paint.print(paragraphs())
    newest = f", newest {_file(kept[-1])}" if kept else ""
    total = size(sum(row.bytes or 0 for row in kept))
    paint.print(
        [
            paint(f"{len(kept)} entries kept, {total}{newest}; newest commit {commit}", "bold"),
            f"head of the journal: {journal.head}",
        ]
    )


def print_verdict(report: VerifyReport, console: Console) -> None:
    """Prints what `verify` found."""
    for problem in report.problems:
        line = Text.assemble(("✗ ", "red"), (problem.where, "bold"), f": {problem.what}\n  {problem.advice}")
        console.print(line, soft_wrap=True)
    hashed = f"{size(report.bytes_hashed)} hashed" if report.hashed else "no file hashed"
    looked_at = f"{report.events} events, {report.entries} entries, {hashed} in {report.directory}"
    if report.ok:
        whole = "every file is as recorded" if report.hashed else "every file is there, with its size"
        verdict = Text.assemble(("✓ ", "green"), f"the chain holds and {whole}: ", looked_at)
        verdict.append(f"\n  head of the journal: {report.head}")
    else:
        verdict = Text.assemble((f"{len(report.problems)} problem(s)", "red"), ": ", looked_at)
    console.print(verdict, soft_wrap=True)


def size(count: int) -> str:
    """Bytes, as people read them."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"


def _file(row: LogRow) -> str:
    """The name with which the note of an entry begins."""
    return row.note.partition(", ")[0]


def _paragraph(row: LogRow, probes: list[str], paint: Painter) -> str:
    indent = "\n" + " " * (len(f"#{row.seq}") + 2)
    head = paint(f"#{row.seq}  {row.time[:19].replace('T', ' ')}  ", "dim")
    place = " ".join(piece for piece in (row.phase, "" if row.step is None else f"step {row.step}") if piece)
    if place:
        head += paint(place) + "  "
    gone = row.state in _GONE
    head += paint(f"{row.kind} {row.event}".strip(), "dim" if gone else _COLOURS.get(row.kind or row.event, ""))
    if row.bytes is not None:
        head += f"  {size(row.bytes)}"
    if row.sha256:
        head += paint(f"  {row.sha256[:_SHORT_SHA256]}", "dim")
    if gone:
        head += paint(f"  {row.state}", "dim")
    pieces = [head, paint(row.note)] if row.note else [head]
    return indent.join(pieces + probes)


def _probe(name: str, reading: ProbeReading, paint: Painter) -> str:
    limit = f" / {reading.tolerance:g}" if reading.guarded else ""
    # Not "greater than": a rise that is NaN is too high as well.
    high = reading.guarded and not reading.rise <= reading.tolerance
    return f"{paint(name)} {reading.loss:.3f} " + paint(f"({reading.rise:+.3f}{limit})", "red" if high else "")
