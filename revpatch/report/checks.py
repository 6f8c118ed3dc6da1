"""The validation checklist of a run: what was asked, the figure, and whether it passes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from revpatch.ledger.events import ProbeReading, Readings
from revpatch.report.history import PhaseHistory, RollbackHistory, RunHistory
from revpatch.report.matrix import Matrix

MIN_GATE_GAP = 0.1
MAX_NORM_SHARE = 0.5
NOTHING_TO_COMPARE = "no set of the base's own text, or no phase that has learned"
VERDICTS = {True: "pass", False: "fail", None: "not judged"}


@dataclass(frozen=True)
class Row:
    """One figure; `passed` is None where there is nothing to judge."""

    what: str
    figure: str
    passed: bool | None


@dataclass
class Check:
    """One point of the list, and the figures it is made of."""

    name: str
    question: str
    rows: list[Row] = field(default_factory=list)
    figure: str = ""
    """The one figure to look at first."""

    @property
    def passed(self) -> bool | None:
        """Whether no figure fails; None if none could be judged."""
        judged = [row.passed for row in self.rows if row.passed is not None]
        return all(judged) if judged else None


def checklist(run: RunHistory, matrix: Matrix | None) -> list[Check]:
    """The five checks, over the phases that are committed."""
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
                check.rows.append(Row(f"{name} in phase {phase.name}", words, None))
                continue
            fell = gain.value > 0 and (gain.low is None or gain.low > 0)
            check.rows.append(Row(f"{name} in phase {phase.name}", f"{gain} nats per token gained", fell))
    if check.passed is None and check.rows:
        check.rows.append(Row("all phases", "none has learned anything", False))
    check.figure = _first_figure(check, "no set is taught by a phase")
    return check


def _stability(run: RunHistory) -> Check:
    check = Check("stability", "Was every guarded probe within its tolerance of its phase's start at every commit?")
    worst = (-math.inf, "nothing was guarded yet")
    for phase in run.committed:
        for name, reading in _guarded(phase.commit).items():
            drift, tolerance = reading.drift, reading.tolerance
            figure = f"{drift:+.4f} of {tolerance:g}"
            check.rows.append(Row(f"{name} at the commit of {phase.name}", figure, drift <= tolerance))
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
        check.rows.append(Row(f"phase {phase}", figure, new.gate - old.gate >= MIN_GATE_GAP))
    check.figure = _first_figure(check, NOTHING_TO_COMPARE)
    return check


def _magnitude(run: RunHistory) -> Check:
    question = f"Is ‖h − u‖ on the base's own text at most {MAX_NORM_SHARE:g} of what it is on the new?"
    check = Check("patch magnitude", question)
    for phase, names, new, old in _new_against_old(run):
        new_norm, old_norm = new.patch_norm, old.patch_norm
        figure = f"{new_norm:.3g} on {names[0]}, {old_norm:.3g} on {names[1]}"
        check.rows.append(Row(f"phase {phase}", figure, old_norm <= MAX_NORM_SHARE * new_norm < math.inf))
    check.figure = _first_figure(check, NOTHING_TO_COMPARE)
    return check


def _ledger(run: RunHistory) -> Check:
    check = Check("ledger usefulness", "Did every rollback restore the probes, and did training go on after it?")
    back = [(phase, rollback) for phase in run.phases for rollback in phase.rollbacks]
    for phase, rollback in back:
        what = f"{phase.name} at step {rollback.step - phase.first_step}"
        check.rows.append(Row(f"{what}: restored", *_restored(rollback)))
        went_on = True if rollback.went_on else False if run.ended else None
        words = f"next: {rollback.went_on}" if rollback.went_on else "no step was probed since"
        check.rows.append(Row(f"{what}: went on", words, went_on))
    check.figure = f"{len(back)} rollbacks" if back else "no rollback was needed"
    if check.passed is False and (first := _first_row(check)) is not None:
        check.figure += f"; {first.what}: {first.figure}"
    return check


def _restored(rollback: RollbackHistory) -> tuple[str, bool | None]:
    """The guarded probe that had risen most, before and as it was measured afterwards, and whether all are within
    their tolerances now; None if none was measured."""
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


def _first_row(check: Check) -> Row | None:
    """The first that fails, else the first that is judged."""
    judged = [row for row in check.rows if row.passed is not None]
    return next((row for row in judged if not row.passed), judged[0] if judged else None)


def _first_figure(check: Check, none: str) -> str:
    """That of `_first_row`; `none` where nothing is judged."""
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
