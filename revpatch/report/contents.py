"""All that a report says, before it is shown in one way or another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from revpatch.ledger.plain import to_plain
from revpatch.report.checks import Check, checklist
from revpatch.report.history import RunHistory, read_history
from revpatch.report.matrix import Estimate, Matrix, matrix_of

MEASURES = {
    "average": "mean of −loss over the taught corpora, after the last phase",
    "BWT": "what later phases did to corpora taught before them; below 0 is forgetting",
    "forgetting": "from each earlier corpus's best to the end; above 0 was forgotten",
    "FWT": "what earlier phases did for corpora before they were taught",
    "base text since the base": "change of −loss on what the base knew; below 0 is forgetting",
}
"""What each measure says, in the order in which they are shown."""


@dataclass(frozen=True)
class Report:
    """The report of a run."""

    run: RunHistory
    matrix: Matrix | None
    measures: dict[str, Estimate | None]
    checks: list[Check]

    @property
    def unjudged(self) -> str:
        """Why there is no checklist; empty if there is one."""
        if self.checks:
            return ""
        return "The run has no probe sets: nothing is judged." if self.run.committed else "No phase is committed yet."

    def as_fields(self) -> dict[str, Any]:
        """For programs: plain values."""
        matrix = None
        if self.matrix is not None:
            rows, sets, taught = self.matrix.rows, self.matrix.sets, self.matrix.taught_by
            matrix = {"rows": rows, "sets": sets, "taught_by": taught, "R": self.matrix.values.tolist()}
        plain: dict[str, Any] = to_plain(
            {
                "environment": self.run.environment,
                "checks": [{**asdict(check), "passed": check.passed} for check in self.checks],
                "matrix": matrix,
                "confidence": self.run.confidence,
                "measures": {name: None if of is None else asdict(of) for name, of in self.measures.items()},
                "happenings": [asdict(happening) for happening in self.run.happenings],
                "samples": [{"after": after, "texts": texts} for after, texts in self.run.samples],
            }
        )
        return plain


def report_of(run: Path) -> Report:
    """Reads the run's folder.

    Raises:
        ValueError, OSError: as `read_history`.
    """
    history = read_history(run)
    matrix = matrix_of(history)
    return Report(history, matrix, {} if matrix is None else matrix.measures(), checklist(history, matrix))
