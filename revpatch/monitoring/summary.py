"""The table at the end of a run, read from its journal: what each phase learned, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from revpatch.ledger.history import effective
from revpatch.ledger.journal import Journal


def print_summary(run: Path, console: Console) -> None:
    """One row a probe set and commit: loss before and after the phase, drift against tolerance, gate, patch norm.

    Raises JournalError for a damaged journal, FileNotFoundError if `run` holds none.
    """
    events = effective(Journal(run / "ledger/journal.jsonl", readonly=True).records())
    commits = [event for event in events if event["event"] == "commit"]
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
    for event in commits:
        label = f"{event['phase']}  ({event['rollbacks']} rollbacks)"
        for name, values in event["sets"].items():
            table.add_row(label, name, *_cells(values))
            label = ""
        table.add_section()
    console.print(table)


def _cells(values: dict[str, Any]) -> list[str]:
    change, tolerance = float(values["loss"]) - float(values["before"]), values["tolerance"]
    guarded = values["guarded"]
    colour = "green" if change <= tolerance else "red"
    return [
        f"{values['before']:.3f}",
        f"{values['loss']:.3f}",
        f"[{colour}]{change:+.3f}[/]" if guarded else f"{change:+.3f}",
        f"{values['loss'] - values['base']:+.3f}",
        f"{tolerance:g}" if guarded else "not guarded",
        f"{values['gate']:.2f}",
        f"{values['patch_norm']:.3g}",
    ]
