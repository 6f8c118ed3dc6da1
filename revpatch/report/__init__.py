"""What became of a run: its checklist and all that a report says, in the terminal or as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from revpatch.durable import to_plain
from revpatch.ledger.events import ProbeReading, Readings
from revpatch.monitoring.tensorboard import colours, ink_on
from revpatch.report.history import Estimate, Matrix, PhaseHistory, RollbackHistory, RunHistory, matrix_of, read_history

MIN_GATE_GAP = 0.1
MAX_NORM_SHARE = 0.5
NOTHING_TO_COMPARE = "no set of the base's own text, or no phase that has learned"
VERDICTS = {True: "pass", False: "fail", None: "not judged"}


@dataclass(frozen=True)
class CheckRow:
    """One figure; `passed` is None where there is nothing to judge."""

    what: str
    figure: str
    passed: bool | None


@dataclass
class Check:
    """One point of the list, and the figures it is made of."""

    name: str
    question: str
    rows: list[CheckRow] = field(default_factory=list)
    figure: str = ""
    """The one figure to look at first."""

    @property
    def passed(self) -> bool | None:
        """Return whether no figure fails; None if none could be judged."""
        judged = [row.passed for row in self.rows if row.passed is not None]
        return all(judged) if judged else None


def checklist(run: RunHistory, matrix: Matrix | None) -> list[Check]:
    """Return the five checks, over the phases that are committed."""
    if matrix is None or not run.committed:
        return []
    return [
        _plasticity(run, matrix),
        _stability(run),
        _locality(run),
        _magnitude(run),
        _ledger(run),
    ]


def _plasticity(run: RunHistory, matrix: Matrix) -> Check:
    check = Check("plasticity", "Did the held-out loss of each new corpus fall, measurably?")
    for row, phase in enumerate(run.committed, start=1):
        for name in _taught(run, phase):
            if name not in matrix.sets:
                continue
            gain = matrix.difference(row, row - 1, matrix.sets.index(name))
            if phase.given_up:
                words = f"given up after {len(phase.rollbacks)} rollbacks, as it began"
                check.rows.append(CheckRow(f"{name} in phase {phase.name}", words, None))
                continue
            fell = gain.value > 0 and (gain.low is None or gain.low > 0)
            check.rows.append(CheckRow(f"{name} in phase {phase.name}", f"{gain} nats per token gained", fell))
    if check.passed is None and check.rows:
        check.rows.append(CheckRow("all phases", "none has learned anything", False))
    check.figure = _first_figure(check, "no set is taught by a phase")
    return check


def _stability(run: RunHistory) -> Check:
    check = Check("stability", "Was every guarded probe within its tolerance of its phase's start at every commit?")
    worst = (-math.inf, "nothing was guarded yet")
    for phase in run.committed:
        for name, reading in _guarded(phase.commit).items():
            drift, tolerance = reading.drift, reading.tolerance
            figure = f"{drift:+.4f} of {tolerance:g}"
            check.rows.append(CheckRow(f"{name} at the commit of {phase.name}", figure, drift <= tolerance))
            worst = max(worst, (drift / tolerance, f"worst: {name} {figure} at {phase.name}"))
    check.figure = worst[1]
    return check


def _locality(run: RunHistory) -> Check:
    question = f"Is the mean gate higher on each new corpus than on the base's own text, by {MIN_GATE_GAP:g} or more?"
    check = Check("locality", question)
    for phase, names, new, old in _new_against_old(run):
        figure = f"mean gate {new.gate:.2f} on {names[0]}, {old.gate:.2f} on {names[1]}"
        if new.sparsity is not None and old.sparsity is not None:
            figure += f"; below 0.1 on {new.sparsity:.0%} and {old.sparsity:.0%} of tokens"
        check.rows.append(CheckRow(f"phase {phase}", figure, new.gate - old.gate >= MIN_GATE_GAP))
    check.figure = _first_figure(check, NOTHING_TO_COMPARE)
    return check


def _magnitude(run: RunHistory) -> Check:
    question = f"Is ‖h − u‖ on the base's own text at most {MAX_NORM_SHARE:g} of what it is on the new?"
    check = Check("patch magnitude", question)
    for phase, names, new, old in _new_against_old(run):
        new_norm, old_norm = new.patch_norm, old.patch_norm
        figure = f"{new_norm:.3g} on {names[0]}, {old_norm:.3g} on {names[1]}"
        check.rows.append(CheckRow(f"phase {phase}", figure, old_norm <= MAX_NORM_SHARE * new_norm < math.inf))
    check.figure = _first_figure(check, NOTHING_TO_COMPARE)
    return check


def _ledger(run: RunHistory) -> Check:
    check = Check("ledger usefulness", "Did every rollback restore the probes, and did training go on after it?")
    back = [(phase, rollback) for phase in run.phases for rollback in phase.rollbacks]
    for phase, rollback in back:
        what = f"{phase.name} at step {rollback.step - phase.first_step}"
        check.rows.append(CheckRow(f"{what}: restored", *_restored(rollback)))
        went_on = True if rollback.went_on else False if run.ended else None
        words = f"next: {rollback.went_on}" if rollback.went_on else "no step was probed since"
        check.rows.append(CheckRow(f"{what}: went on", words, went_on))
    check.figure = f"{len(back)} rollbacks" if back else "no rollback was needed"
    if check.passed is False and (first := _first_row(check)) is not None:
        check.figure += f"; {first.what}: {first.figure}"
    return check


def _restored(rollback: RollbackHistory) -> tuple[str, bool | None]:
    """Return the guarded probe that had risen most, before and as it was measured afterwards, and whether all are
    within their tolerances now; None if none was measured."""
    restored = _guarded(rollback.restored)
    if not restored:
        return f"back to {rollback.to_file}; no guarded probe was measured there", None
    within = all(reading.drift <= reading.tolerance for reading in restored.values())
    rejected = {name: reading for name, reading in _guarded(rollback.rejected).items() if name in restored}
    if not rejected:
        return f"back to {rollback.to_file}; no probe was measured of what was given up", within
    name = max(rejected, key=lambda n: _or_infinite(rejected[n].loss - restored[n].loss))
    lower = _or_infinite(rejected[name].loss) >= restored[name].loss
    return f"{name} {rejected[name].loss:.4f} back to {restored[name].loss:.4f}", within and lower


def _first_row(check: Check) -> CheckRow | None:
    """Return the first that fails, else the first that is judged."""
    judged = [row for row in check.rows if row.passed is not None]
    return next((row for row in judged if not row.passed), judged[0] if judged else None)


def _first_figure(check: Check, none: str) -> str:
    """Return that of `_first_row`; `none` where nothing is judged."""
    first = _first_row(check)
    return none if first is None else first.figure


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _taught(run: RunHistory, phase: PhaseHistory) -> list[str]:
    return [name for name, index in run.taught_by.items() if index == phase.index]


def _new_against_old(run: RunHistory) -> Iterator[tuple[str, tuple[str, str], ProbeReading, ProbeReading]]:
    """For each set that a committed phase teaches and each of the base's own text: the phase's name, the names of the
    two sets, and what was measured on them at the commit. Nothing for a phase that was given up."""
    for phase in run.committed:
        sets = phase.commit or {}
        old = [name for name, index in run.taught_by.items() if index == 0 and name in sets]
        new = [] if phase.given_up else [name for name in _taught(run, phase) if name in sets]
        for name in new:
            for other in old:
                yield phase.name, (name, other), sets[name], sets[other]


def _guarded(sets: Readings | None) -> Readings:
    return {name: reading for name, reading in (sets or {}).items() if reading.guarded}


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
        """Return why there is no checklist; empty if there is one."""
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


_COLOURS = {True: "green", False: "bold red", None: "dim"}


def print_report(report: Report, console: Console) -> None:
    """Prints it."""
    console.print(Text.assemble((report.run.directory.name, "bold"), f": {report.run.environment['state']}"))
    for check in report.checks:
        console.print(_line(check.passed, f"{check.name}: {check.figure}"), soft_wrap=True)
        for row in check.rows:
            console.print(Text("    ") + _line(row.passed, f"{row.what}: {row.figure}"), soft_wrap=True)
    if not report.checks:
        console.print(report.unjudged)
    if report.matrix is not None:
        console.print(_matrix(report.matrix))
        console.print(Text(f"intervals of {report.run.confidence:.0%}", "dim"))
        for name, meaning in MEASURES.items():
            found = report.measures.get(name)
            figure = "no corpus to take it from" if found is None else str(found)
            console.print(Text.assemble((f"{name}  ", "bold"), figure, (f"  {meaning}", "dim")), soft_wrap=True)
    for happening in report.run.happenings:
        words = f"{happening.time}  step {happening.step}  {happening.words}"
        console.print(Text(words, "red" if happening.kind == "rollback" else ""), soft_wrap=True)
    for after, texts in report.run.samples:
        for sample in texts:
            parts = ((f"sample, {after}: ", "dim"), (sample.prompt, "bold"), sample.text)
            console.print(Text.assemble(*parts), soft_wrap=True)
    for name, value in report.run.environment.items():
        console.print(Text.assemble((f"{name}  ", "dim"), value), soft_wrap=True)


def _matrix(matrix: Matrix) -> Table:
    """Return each column coloured from its worst to its best, as on the page; bold: the phase that teaches it."""
    table = Table("after", title="R = −loss, nats per token", title_justify="left")
    for name in matrix.sets:
        table.add_column(Text(name), justify="right")
    for i, (after, values) in enumerate(zip(matrix.rows, matrix.values, strict=True)):
        cells = []
        for value, share, taught in zip(values, matrix.shares[i], matrix.taught_by, strict=True):
            red, green, blue = (int(channel) for channel in colours(np.asarray(share)))
            style = f"{ink_on(red, green, blue)} on #{red:02x}{green:02x}{blue:02x}"
            cells.append(Text(f"{value:.3f}", f"bold {style}" if taught == i > 0 else style))
        table.add_row(Text(after), *cells)
    return table


def _line(passed: bool | None, words: str) -> Text:
    return Text.assemble((f"{VERDICTS[passed]:<11}", _COLOURS[passed]), words)
