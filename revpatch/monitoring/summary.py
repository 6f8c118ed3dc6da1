"""The table at the end of a run, read from its journal: what each phase learned, and what it cost."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from revpatch.ledger.events import PhaseCommitted, ProbeReading, RunResumed
from revpatch.ledger.history import effective
from revpatch.ledger.journal import Journal


def print_summary(run: Path, console: Console) -> None:
    """One row a probe set and commit: loss before and after the phase, drift against tolerance, gate, patch norm.

    Raises JournalError for a damaged journal, FileNotFoundError if `run` holds none.
    """
    events = effective(Journal(run / "ledger/journal.jsonl", readonly=True).events(PhaseCommitted, RunResumed))
    title = Text(f"{run.name}: held-out losses in nats per token", style="table.title")
    table = Table(title=title, title_justify="left")
    for column in (
        "phase",
        "held-out set",
        "before",
        "after",
        "change",
        "since base",
        "tolerance",
        "gate",
        "patch norm",
    ):
        table.add_column(column, justify="left" if column in ("phase", "held-out set") else "right")
    for event in events:
        if not isinstance(event, PhaseCommitted):
            continue
        label = f"{event.phase}  ({event.rollbacks} rollbacks)"
        for name, reading in event.sets.items():
            table.add_row(label, name, *_cells(reading))
            label = ""
        table.add_section()
    console.print(table)


def _cells(reading: ProbeReading) -> list[str]:
    assert reading.before is not None and reading.base is not None  # the trainer knows both
    change, tolerance = reading.loss - reading.before, reading.tolerance
    colour = "green" if change <= tolerance else "red"
    return [
        f"{reading.before:.3f}",
        f"{reading.loss:.3f}",
        f"[{colour}]{change:+.3f}[/]" if reading.guarded else f"{change:+.3f}",
        f"{reading.loss - reading.base:+.3f}",
        f"{tolerance:g}" if reading.guarded else "not guarded",
        f"{reading.gate:.2f}",
        f"{reading.patch_norm:.3g}",
    ]
