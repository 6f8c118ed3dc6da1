"""A run as its folder tells it, phase by phase, and the matrix of every corpus after every phase.

R[i, j] is minus the held-out loss (nats per token) of set j after phase i; row 0 is what the run begins with: the base,
or the patch that was restored. With T phases committed, and t(j) the phase that teaches set j (1 to T):

    average     mean over j of R[T, j]
    BWT         mean over t(j) < T of R[T, j] − R[t(j), j]          (Lopez-Paz and Ranzato, 2017)
    forgetting  mean over t(j) < T of max over i < T of R[i, j] − R[T, j]     (after Chaudhry et al., 2018)
    FWT         mean over t(j) > 1 of R[t(j) − 1, j] − R[0, j]

Sets that no phase teaches, what the base knew, are not in these means: their change since the base stands for itself.
Differences are taken block by block, so that what makes a block hard cancels; the interval of a mean over sets is that
of Welch and Satterthwaite. That of forgetting takes the best row as given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from revpatch.config import SELF
from revpatch.config.file import load_config
from revpatch.evaluation.guard import student_t_quantile
from revpatch.ledger import events as kinds
from revpatch.ledger.events import Event, ProbeReading, Readings, Sample
from revpatch.ledger.journal import Journal
from revpatch.ledger.ledger import JOURNAL_NAME, effective
from revpatch.train.resume import CONFIG_NAME

_TRAINED_ON = (kinds.Probed, kinds.RolledBack, kinds.PhaseBegun, kinds.RunEnded)
"""The events that no run comes to, after a rollback, without training on; or, after its last step, without its end."""


@dataclass(frozen=True)
class ProbePoint:
    """The probes at a step of the run; `training` has the means of the loss's terms since the last log line."""

    step: int
    sets: Readings
    training: dict[str, float]


@dataclass(frozen=True)
class RollbackHistory:
    """A return to an earlier state. `rejected`: the probes of the state that was given up, `restored`: those measured
    after the return; empty where none was. `went_on`: the event that shows that training went on, or "" if there is
    none yet."""

    step: int
    to_file: str
    reason: str
    rejected: Readings
    restored: Readings
    went_on: str


@dataclass
class PhaseHistory:
    """One phase; `index` counts from 1, as rows of the matrix do, `first_step` is of the run."""

    index: int
    name: str
    first_step: int
    steps: int
    start: Readings = field(default_factory=dict)
    probes: list[ProbePoint] = field(default_factory=list)
    rollbacks: list[RollbackHistory] = field(default_factory=list)
    commit: Readings | None = None
    commit_step: int | None = None
    """Step of the phase at which the committed state was reached; 0 is its start."""

    @property
    def given_up(self) -> bool:
        """It was committed as it began: whatever it learned was rolled back."""
        return self.commit is not None and self.commit_step == 0

    @property
    def end(self) -> int:
        """Its last step, of the run."""
        return self.first_step + self.steps


@dataclass(frozen=True)
class TimelineEvent:
    """An event that people ask about; `step` is of the run."""

    time: str
    step: int
    kind: str
    words: str


@dataclass
class RunHistory:
    """What the folder says."""

    directory: Path
    phases: list[PhaseHistory] = field(default_factory=list)
    taught_by: dict[str, int] = field(default_factory=dict)
    """For each probe set the phase (from 1) that teaches its corpus; 0 is what is guarded from the start."""
    tolerances: dict[str, float] = field(default_factory=dict)
    confidence: float = 0.95
    begins_with: str = "base"
    """The unpatched base, or the file of the patch that a restored run begins with."""
    happenings: list[TimelineEvent] = field(default_factory=list)
    samples: list[tuple[str, list[Sample]]] = field(default_factory=list)
    """After what (base, or a phase) and the texts, oldest first."""
    environment: dict[str, str] = field(default_factory=dict)
    ended: bool = False

    @property
    def committed(self) -> list[PhaseHistory]:
        """The phases that are committed."""
        return [phase for phase in self.phases if phase.commit is not None]


def read_history(run: Path) -> RunHistory:
    """Reads the journal (its chain is checked) and the config of a run, which may be training right now.

    Raises:
        JournalError: the journal is missing, empty or damaged.
        FileNotFoundError, ConfigError: the config is missing, or isn't one.
    """
    journal = Journal(run / "ledger" / JOURNAL_NAME, readonly=True)
    journal.check_begun()
    config = load_config(run / CONFIG_NAME)
    if config.replays_own_text:
        config = config.with_own_text(SELF)  # where it lies is not asked here
    names = [phase.name for phase in config.phases]
    found = RunHistory(run, confidence=config.rollback.confidence)
    for probe in config.probes.sets:
        found.taught_by[probe.name] = 0 if probe.guard_after is None else names.index(probe.guard_after) + 1
        found.tolerances[probe.name] = probe.tolerance
    first_steps = [sum(phase.steps for phase in config.phases[:index]) for index in range(len(names))]
    reader = _Reader(found, {phase.name: (first_steps[i], phase.steps) for i, phase in enumerate(config.phases)})
    events = effective(journal.events())
    for number, event in enumerate(events):
        reader.take(event, events[number + 1 :])
    _describe(found, journal, events)
    return found


class _Reader:
    def __init__(self, run: RunHistory, steps: dict[str, tuple[int, int]]) -> None:
        self.run, self.steps = run, steps
        self.phases: dict[str, PhaseHistory] = {}
        self.rejected: dict[tuple[str, int], Readings] = {}

    def take(self, event: Event, later: list[Event]) -> None:
        """Put an event where it belongs; `later` are those after it."""
        match event:
            case kinds.RunBegun():
                self.run.begins_with = event.origin or self.run.begins_with
            case kinds.RunEnded():
                self.run.ended = True
            case kinds.SamplesWritten():
                self.run.samples.append((event.phase, event.texts))
            case kinds.PhaseBegun():
                first, steps = self.steps[event.phase]
                phase = PhaseHistory(len(self.run.phases) + 1, event.phase, first, steps)
                self.phases[event.phase] = phase
                self.run.phases.append(phase)
                self._note(event, first, f"{event.phase} begins")
            case kinds.EntryWritten():
                self._entry(event)
            case kinds.RunResumed() | kinds.TornEnd() | kinds.OrphanFound():
                self._note(event, self._here(), f"{event.event}: the run was stopped or killed, and went on")
            case _ if (known := self.phases.get(getattr(event, "phase", ""))) is not None:
                self._in_phase(known, event, later)

    def _entry(self, entry: kinds.EntryWritten) -> None:
        phase = self.phases.get(entry.phase)
        if entry.made_by is not None:  # a patch that no phase has trained, after the run
            self._note(entry, self._here(), f"{entry.made_by.get('operation', 'surgery')} made {entry.file}")
        if phase is not None and entry.kind == "start":
            phase.start = entry.sets or {}
        elif phase is not None and entry.kind == "rollback":
            self.rejected[phase.name, entry.step] = entry.sets or {}

    def _in_phase(self, phase: PhaseHistory, event: Event, later: list[Event]) -> None:
        match event:
            case kinds.Probed():
                phase.probes.append(ProbePoint(phase.first_step + event.step, event.sets, event.training))
            case kinds.RolledBack():
                step, to_file, reason = phase.first_step + event.step, event.to_file, event.reason
                next_one = next((e.event for e in later if isinstance(e, _TRAINED_ON)), "")
                rejected = self.rejected.get((phase.name, event.step), {})
                phase.rollbacks.append(RollbackHistory(step, to_file, reason, rejected, event.restored, next_one))
                self._note(event, step, f"{phase.name} rolled back to {to_file}: {reason}")
            case kinds.PhaseCommitted():
                phase.commit, phase.commit_step = event.sets, event.step
                self._note(event, phase.end, f"{phase.name} committed, as it was at its step {event.step}")
            case kinds.ShardQuarantined():
                words = f"went on without a broken shard: {event.location}: {event.reason}"
                self._note(event, phase.first_step + event.step, words)
            case kinds.Interrupted():
                words = f"{phase.name} stopped by a signal, with a snapshot"
                self._note(event, phase.first_step + event.step, words)

    def _here(self) -> int:
        last = self.run.phases[-1] if self.run.phases else None
        return 0 if last is None else (last.probes[-1].step if last.probes else last.first_step)

    def _note(self, event: Event, step: int, words: str) -> None:
        self.run.happenings.append(TimelineEvent(_to_the_second(event), step, event.event, words))


def _to_the_second(event: Event | None) -> str:
    return "?" if event is None else event.time[:19].replace("T", " ")


def _describe(run: RunHistory, journal: Journal, events: list[Event]) -> None:
    begun = [event for event in events if isinstance(event, kinds.RunBegun)]
    first = begun[0] if begun else None
    told = [event.facts for event in events if isinstance(event, kinds.RunBegun | kinds.RunResumed)]
    facts = told[-1] if told else {}
    state = "every phase is committed" if run.ended else "not over, or stopped before its end"
    run.environment = {
        "run": str(run.directory),
        "state": state,
        "began (UTC)": _to_the_second(first),
        "last event (UTC)": _to_the_second(events[-1] if events else None),
        "seed": "?" if first is None else str(first.seed),
        "sha256 of the base": "?" if first is None else first.base.sha256,
        **{key: f"{value:,}" if isinstance(value, int) else str(value) for key, value in facts.items()},
        "head of the journal": journal.head,
    }


Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its interval, which are None where the journal has no losses block by block."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:+.4f} to {self.high:+.4f})"
        return f"{self.value:+.4f}{interval}"


@dataclass(frozen=True)
class Matrix:
    """R, and the losses that it is made of."""

    rows: list[str]
    """"base", or the file of the patch that the run begins with; then the phases that are committed."""
    sets: list[str]
    taught_by: list[int]
    """For each set the row of the phase that teaches it; 0 is none."""
    values: NDArray[np.float64]
    """(rows, sets): R"""
    losses: list[list[Losses | None]]
    """For each row and set the loss of each block, if the journal has it."""
    confidence: float
    base: list[float] | None = None
    """(sets,): R of the unpatched base, where row 0 is another patch; its losses block by block are not known."""

    @property
    def last(self) -> int:
        """T."""
        return len(self.rows) - 1

    @property
    def shares(self) -> NDArray[np.float64]:
        """(rows, sets): where each value lies from its column's worst, 0, to its best, 1."""
        low, high = np.nanmin(self.values, axis=0), np.nanmax(self.values, axis=0)
        found: NDArray[np.float64] = (self.values - low) / np.maximum(high - low, 1e-9)
        return found

    def difference(self, row: int, earlier: int, column: int) -> Estimate:
        """R[row, column] − R[earlier, column]."""
        return self._mean([(row, earlier, column)])

    def measures(self) -> dict[str, Estimate | None]:
        """Average, BWT, forgetting, FWT and what became of the base's own text; None where no set is of that kind."""
        last, taught = self.last, [(j, t) for j, t in enumerate(self.taught_by) if 0 < t <= self.last]
        past = [(j, t) for j, t in taught if t < last]
        best = {j: int(np.argmax(self.values[:last, j])) for j, _ in past}
        asked: dict[str, list[tuple[int, int | None, int]]] = {
            "average": [(last, None, j) for j, _ in taught],
            "BWT": [(last, t, j) for j, t in past],
            "forgetting": [(best[j], last, j) for j, _ in past],
            "FWT": [(t - 1, 0, j) for j, t in taught if t > 1],
            "base text since the base": [(last, 0, j) for j, t in enumerate(self.taught_by) if t == 0 and last],
        }
        found = {name: self._mean(cells) if cells else None for name, cells in asked.items()}
        if self.base is not None and (old := [j for j, t in enumerate(self.taught_by) if t == 0]):
            since = [self.values[last, j] - self.base[j] for j in old]
            found["base text since the base"] = Estimate(float(np.mean(since)))
        return found

    def _mean(self, cells: Sequence[tuple[int, int | None, int]]) -> Estimate:
        """Mean over sets of R[row, j], less R[earlier, j] where `earlier` is given."""
        value = float(np.mean([self.values[i, j] - (0 if e is None else self.values[e, j]) for i, e, j in cells]))
        squares, freedom = 0.0, 0.0
        for row, earlier, column in cells:
            now, then = self.losses[row][column], None if earlier is None else self.losses[earlier][column]
            if now is None or (earlier is not None and (then is None or then.shape != now.shape)) or now.size < 2:
                return Estimate(value)
            blocks = now if then is None else now - then
            square = float(blocks.var(ddof=1)) / blocks.size
            squares, freedom = squares + square, freedom + square**2 / (blocks.size - 1)
        if not math.isfinite(squares):
            return Estimate(value)
        margin = 0.0
        if squares > 0:
            degrees = max(1, math.floor(squares**2 / freedom))
            margin = student_t_quantile(self.confidence, degrees) * math.sqrt(squares) / len(cells)
        return Estimate(value, value - margin, value + margin)


def matrix_of(run: RunHistory) -> Matrix | None:
    """Return the matrix of a run; None before its probes were measured first."""
    if not run.phases or not run.phases[0].start:
        return None
    committed, start = run.committed, run.phases[0].start
    of_rows: list[Readings] = [start, *(phase.commit or {} for phase in committed)]
    sets = [name for name in run.taught_by if all(name in row for row in of_rows)]
    return Matrix(
        rows=[run.begins_with, *(phase.name for phase in committed)],
        sets=sets,
        taught_by=[run.taught_by[name] for name in sets],
        values=np.array([[-row[name].loss for name in sets] for row in of_rows], dtype=np.float64),
        losses=[[_blocks(row[name]) for name in sets] for row in of_rows],
        confidence=run.confidence,
        base=None if run.begins_with == "base" else [-_of_the_base(start[name]) for name in sets],
    )


def _of_the_base(reading: ProbeReading) -> float:
    assert reading.base is not None  # the trainer knows it
    return reading.base


def _blocks(reading: ProbeReading) -> Losses | None:
    return None if reading.block_losses is None else np.asarray(reading.block_losses, dtype=np.float64)
