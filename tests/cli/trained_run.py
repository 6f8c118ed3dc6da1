"""A run that was trained once by the command line, for the tests that look at it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from command import Result

STEPS = {"first": 14, "second": 12}
PROMPT = "the little kettle"


@dataclass
class Run:
    """A run that was trained once, and is read only."""

    directory: Path
    config: Path
    overrides: list[str]
    result: Result

    def entry(self, name: str) -> Path:
        return self.directory / "ledger" / name


def copy_of(run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.directory, tmp_path / "copied"))
