"""Figures of a measurement, as every tool here prints them and writes them with --json.

Imports no torch: worker processes of a measurement import what its script does.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One figure: what was asked of it, what was measured, and whether that is enough. `measured` is None, and `holds`
    false, for what could not be measured here; `asked` is empty, and `holds` true, for what nothing was asked of."""

    name: str
    asked: str
    measured: float | str | None
    unit: str
    holds: bool

    @classmethod
    def at_least(cls, name: str, limit: float, measured: float | None, unit: str) -> Figure:
        """A figure that is to be large."""
        return cls(name, f">= {limit:g}", _rounded(measured), unit, measured is not None and measured >= limit)

    @classmethod
    def at_most(cls, name: str, limit: float, measured: float | None, unit: str) -> Figure:
        """A figure that is to be small."""
        return cls(name, f"<= {limit:g}", _rounded(measured), unit, measured is not None and measured <= limit)

    @classmethod
    def plain(cls, name: str, measured: float | str, unit: str) -> Figure:
        """A figure that nothing was asked of, or in words why there is none."""
        return cls(name, "", measured if isinstance(measured, str) else _rounded(measured), unit, True)


def machine(*packages: str) -> str:
    """One line: processor, cores in use, versions."""
    model, cpuinfo = platform.processor() or "cpu", Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        text = cpuinfo.read_text(encoding="utf-8")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name} " in text]
        model = f"{found[1] if found else model} ({', '.join(sets)})"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    threads = f"{os.cpu_count()} cores"
    if (torch := sys.modules.get("torch")) is not None:
        threads += f", {torch.get_num_threads()} threads"
        if torch.cuda.is_initialized():
            model = f"{torch.cuda.get_device_name()}; {model}"
    return f"{model}, {threads}; python {platform.python_version()}, {versions}"


def show(title: str, rows: list[Figure], file: Path | None) -> None:
    """Prints the table and, if a file is named, writes the figures there."""
    from rich.console import Console  # here, as a worker process has no table to print, and a bare machine no rich
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("figure", "asked", "measured", "unit", "holds"):
        table.add_column(column)
    for row in rows:
        measured = "not measured" if row.measured is None else row.measured
        measured = measured if isinstance(measured, str) else f"{measured:,g}"
        table.add_row(escape(row.name), row.asked, escape(measured), row.unit, "yes" if row.holds else "NO")
    Console(width=None if os.isatty(1) else 120).print(table)
    if file is not None:
        write_figures(title, rows, file)


def write_figures(title: str, rows: list[Figure], file: Path) -> None:
    """Writes {"head": the title, "figures": [...]}."""
    content = {"head": title, "figures": [asdict(row) for row in rows]}
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    new.replace(file)  # a tool that is ended leaves a whole file


def read_figures(file: Path) -> list[Figure]:
    """What `write_figures` wrote.

    Raises ValueError, with the file's name, if it can't be read or holds something else.
    """
    try:
        return [Figure(**row) for row in json.loads(file.read_text(encoding="utf-8"))["figures"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file}: expected figures that a tool here wrote with --json, found {type(error).__name__}: {error}"
        ) from None


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as docs carry it."""
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
