"""A run as its folder tells it, phase by phase: journal and config, and neither base model nor entries."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from revpatch.config import SELF
from revpatch.config_file import load_config
from revpatch.ledger import events as kinds
from revpatch.ledger.events import Event, Readings, Sample
from revpatch.ledger.history import JOURNAL_NAME, effective
from revpatch.ledger.journal import Journal
from revpatch.training.resume import CONFIG_NAME

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
class Happening:
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
    """The bare base, or the file of the patch that a restored run begins with."""
    happenings: list[Happening] = field(default_factory=list)
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
    if config.rehearses_own_text:
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
        self.run.happenings.append(Happening(_to_the_second(event), step, event.event, words))


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
