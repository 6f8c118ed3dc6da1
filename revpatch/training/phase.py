"""Where a phase is: its data, its good state, and which of its steps are in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from revpatch.config import PhaseConfig
from revpatch.training.batches import Batches
from revpatch.training.rollback import GoodState


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
    probed: tuple[int, dict[str, dict[str, Any]]] = (0, {})
    """The step of the last probe, and what the journal keeps of it."""
    rollbacks: int = 0
    """States given up so far."""
    lr_factor: float = 1.0

    def global_step(self, step: int) -> int:
        """Optimizer steps of the run at a step of this phase."""
        return self.batches.first_step + step
