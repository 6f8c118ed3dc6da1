"""Where a phase is: its data, its good state, and which of its steps are in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from revpatch.config import PhaseConfig
from revpatch.ledger.events import Readings
from revpatch.training.batches import Batches
from revpatch.training.rollback import GoodState
from revpatch.training.snapshot import PhaseProgress


@dataclass
class Phase:
    """Where a phase is."""

    index: int
    config: PhaseConfig
    batches: Batches
    start: GoodState
    good: GoodState
    learned: list[int] = field(default_factory=list)
    """Steps whose effect is in the good state."""
    pending: list[int] = field(default_factory=list)
    """Steps since then."""
    probed: tuple[int, Readings] = (0, {})
    """The step of the last probe, and what the journal keeps of it."""
    rollbacks: int = 0
    """States given up so far."""
    lr_factor: float = 1.0
    done: int = 0
    """Optimizer steps made."""
    epochs: list[int] = field(default_factory=list)
    """The epoch that each of its sets of shards is in; empty before the first step."""

    @classmethod
    def of(cls, index: int, config: PhaseConfig, batches: Batches, progress: PhaseProgress) -> Phase:
        """A phase where a snapshot left it."""
        epochs = batches.mixture.epochs(progress.step - 1) if progress.step else []
        return cls(
            index,
            config,
            batches,
            progress.start,
            progress.good,
            list(progress.learned),
            list(progress.pending),
            progress.probed,
            progress.rollbacks,
            progress.lr_factor,
            progress.step,
            epochs,
        )

    def progress(self) -> PhaseProgress:
        """What a snapshot keeps of it."""
        return PhaseProgress(
            self.done,
            self.start,
            self.good,
            list(self.learned),
            list(self.pending),
            self.probed,
            self.rollbacks,
            self.lr_factor,
        )

    def global_step(self, step: int) -> int:
        """Optimizer steps of the run at a step of this phase."""
        return self.batches.first_step + step
