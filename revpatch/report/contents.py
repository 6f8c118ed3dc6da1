"""All that a report says, before it is shown in one way or another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from revpatch.ledger.plain import to_plain
from revpatch.report.checks import Check, checklist
from revpatch.report.curves import Line, Mark, chart
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

_COLOURS = ("#1f77b4", "#d95f02", "#7b3fa0", "#1b9e77", "#b8860b", "#c2185b", "#5d6d7e", "#8c564b")
_MARKED = ("commit", "rollback", "quarantine")


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

    def charts(self) -> list[str]:
        """The curves as <figure>s: the training loss, and every probe with its phases' starts and limits."""
        marks = [Mark(h.step, h.kind, f"step {h.step}: {h.words}") for h in self.run.happenings if h.kind in _MARKED]
        points = [point for phase in self.run.phases for point in phase.probes]
        trained = [(point.step, point.training["lm"]) for point in points if "lm" in point.training]
        speed = [(p.step, p.training["tokens_per_second"]) for p in points if "tokens_per_second" in p.training]
        charts = [chart("training loss on new text, nats per token", [Line("new text", trained, _COLOURS[0])], marks)]
        for number, name in enumerate(self.run.taught_by):
            losses: list[tuple[float, float]] = []
            limits: list[tuple[float, float]] = []
            for phase in self.run.phases:
                if name not in phase.start:
                    continue
                start = phase.start[name]
                losses.append((phase.first_step, start["loss"]))
                losses += ((point.step, point.sets[name]["loss"]) for point in phase.probes)
                losses += [] if phase.commit is None else [(phase.end, phase.commit[name]["loss"])]
                if start["guarded"]:
                    limit = start["loss"] + self.run.tolerances[name]
                    limits += ((phase.first_step, limit), (phase.end, limit), (phase.end, float("nan")))
            lines = [Line(name, losses, _COLOURS[number % len(_COLOURS)])]
            lines += [Line("limit for a commit", limits, "#888", dashed=True)] if limits else []
            charts.append(chart(f"held-out loss of {name}, nats per token", lines, marks))
        gates = [
            Line(name, [(p.step, p.sets[name]["gate"]) for p in points], _COLOURS[number % len(_COLOURS)])
            for number, name in enumerate(self.run.taught_by)
        ]
        charts.append(chart("mean gate on each held-out set", gates, marks))
        charts.append(chart("tokens a second", [Line("tokens/s", speed, _COLOURS[3])], marks))
        return [figure for figure in charts if figure]


def report_of(run: Path) -> Report:
    """Reads the run's folder.

    Raises:
        ValueError, OSError: as `read_history`.
    """
    history = read_history(run)
    matrix = matrix_of(history)
    return Report(history, matrix, {} if matrix is None else matrix.measures(), checklist(history, matrix))
