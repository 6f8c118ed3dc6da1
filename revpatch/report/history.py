"""A run as its folder tells it, phase by phase: journal and config, and neither base model nor entries."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revpatch.config import SELF
from revpatch.config_file import load_config
from revpatch.ledger.history import JOURNAL_NAME, effective
from revpatch.ledger.journal import Journal, Sets
from revpatch.training.resume import CONFIG_NAME

_TRAINED_ON = ("probe", "rollback", "phase_start", "run_end")
"""The events that no run comes to, after a rollback, without training on; or, after its last step, without its end."""


@dataclass(frozen=True)
class ProbePoint:
    """The probes at a step of the run; `training` has the means of the loss's terms since the last log line."""

    step: int
    sets: Sets
    training: dict[str, float]


@dataclass(frozen=True)
class RolledBack:
    """A return to an earlier state. `rejected`: the probes of the state that was given up, `restored`: those measured
    after the return; empty where none was. `went_on`: the event that shows that training went on, or "" if there is
    none yet."""

    step: int
    to_file: str
    reason: str
    rejected: Sets
    restored: Sets
    went_on: str


@dataclass
class PhaseHistory:
    """One phase; `index` counts from 1, as rows of the matrix do, `first_step` is of the run."""

    index: int
    name: str
    first_step: int
    steps: int
    start: Sets = field(default_factory=dict)
    probes: list[ProbePoint] = field(default_factory=list)
    rollbacks: list[RolledBack] = field(default_factory=list)
    commit: Sets | None = None
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
    samples: list[tuple[str, list[dict[str, str]]]] = field(default_factory=list)
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
    recorded = journal.some_records()
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
    events = effective(recorded)
    for number, event in enumerate(events):
        reader.take(event, events[number + 1 :])
    _describe(found, journal, events)
    return found


class _Reader:
    def __init__(self, run: RunHistory, steps: dict[str, tuple[int, int]]) -> None:
        self.run, self.steps = run, steps
        self.phases: dict[str, PhaseHistory] = {}
        self.rejected: dict[tuple[str, int], Sets] = {}

    def take(self, event: dict[str, Any], later: list[dict[str, Any]]) -> None:
        """Puts an event where it belongs; `later` are those after it."""
        kind, name = str(event["event"]), str(event.get("phase"))
        if kind == "run":
            self.run.begins_with = str(event.get("origin", self.run.begins_with))
        elif kind == "run_end":
            self.run.ended = True
        elif kind == "samples":
            self.run.samples.append((name, event["texts"]))
        elif kind == "phase_start":
            first, steps = self.steps[name]
            phase = self.phases[name] = PhaseHistory(len(self.run.phases) + 1, name, first, steps)
            self.run.phases.append(phase)
            self._note(event, first, f"{name} begins")
        elif kind == "entry":
            self._entry(event)
        elif name in self.phases:
            self._in_phase(kind, self.phases[name], event, later)
        elif kind in ("resume", "torn", "orphan"):
            self._note(event, self._here(), f"{kind}: the run was stopped or killed, and went on")

    def _entry(self, event: dict[str, Any]) -> None:
        sets = _numbers(event.get("sets") or {})
        phase = self.phases.get(event["phase"])
        if isinstance(made_by := event.get("made_by"), dict):  # a patch that no phase has trained, after the run
            self._note(event, self._here(), f"{made_by.get('operation', 'surgery')} made {event['file']}")
        if phase is None:
            return
        if event["kind"] == "start":
            phase.start = sets
        elif event["kind"] == "rollback":
            self.rejected[phase.name, event["step"]] = sets

    def _in_phase(self, kind: str, phase: PhaseHistory, event: dict[str, Any], later: list[dict[str, Any]]) -> None:
        step = phase.first_step + event["step"]
        if kind == "probe":
            training = {key: float(value) for key, value in event.get("training", {}).items()}
            phase.probes.append(ProbePoint(step, _numbers(event["sets"]), training))
        elif kind == "rollback":
            next_one = next((str(e["event"]) for e in later if e["event"] in _TRAINED_ON), "")
            rejected = self.rejected.get((phase.name, event["step"]), {})
            restored = _numbers(event.get("restored", {}))
            phase.rollbacks.append(RolledBack(step, event["to_file"], event["reason"], rejected, restored, next_one))
            self._note(event, step, f"{phase.name} rolled back to {event['to_file']}: {event['reason']}")
        elif kind == "commit":
            phase.commit, phase.commit_step = _numbers(event["sets"]), event["step"]
            self._note(event, phase.end, f"{phase.name} committed, as it was at its step {event['step']}")
        elif kind == "quarantine":
            self._note(event, step, f"went on without a broken shard: {event.get('location')}: {event.get('reason')}")
        elif kind == "interrupted":
            self._note(event, step, f"{phase.name} stopped by a signal, with a snapshot")

    def _here(self) -> int:
        last = self.run.phases[-1] if self.run.phases else None
        return 0 if last is None else (last.probes[-1].step if last.probes else last.first_step)

    def _note(self, event: dict[str, Any], step: int, words: str) -> None:
        self.run.happenings.append(Happening(event["time"][:19].replace("T", " "), step, event["event"], words))


def _numbers(sets: Sets) -> Sets:
    """The sets with "NaN" and the like as the numbers that they are."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [float(item) for item in value]
        return value if value is None or isinstance(value, bool) else float(value)

    return {name: {key: number(value) for key, value in values.items()} for name, values in sets.items()}


def _describe(run: RunHistory, journal: Journal, events: list[dict[str, Any]]) -> None:
    began = next((event for event in events if event["event"] == "run"), {})
    facts: dict[str, Any] = next((e["facts"] for e in reversed(events) if isinstance(e.get("facts"), dict)), {})
    state = "every phase is committed" if run.ended else "not over, or stopped before its end"
    run.environment = {
        "run": str(run.directory),
        "state": state,
        "began (UTC)": str(began.get("time", "?"))[:19].replace("T", " "),
        "last event (UTC)": str(events[-1]["time"] if events else "?")[:19].replace("T", " "),
        "seed": str(began.get("seed", "?")),
        "sha256 of the base": str(began.get("base", {}).get("sha256", "?")),
        **{key: f"{value:,}" if isinstance(value, int) else str(value) for key, value in facts.items()},
        "head of the journal": journal.head,
    }
