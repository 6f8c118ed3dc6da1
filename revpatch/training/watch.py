"""Rank 0's eye on the probes: measures them, compares them with what they were, and puts it down for the journal."""

from __future__ import annotations

from typing import Any

import numpy as np

from revpatch.config import Config, ProbeSetConfig
from revpatch.training.guard import Comparison, ProbeSet, compare_all
from revpatch.training.phase import Phase
from revpatch.training.probe import Measurement, Prober

Sets = dict[str, dict[str, Any]]
"""What the journal keeps of each probe set, by name."""


class Watch:
    """The probes of a run. On ranks other than 0 it measures nothing and everything it returns is empty.

    Args:
        config: the run's config.
        prober: measures the patch that is on the model.
        enabled: whether this is rank 0.
    """

    def __init__(self, config: Config, prober: Prober, enabled: bool) -> None:
        self.config, self.prober, self.enabled = config, prober, enabled
        self.first: dict[str, Measurement] = {}

    def measure(self) -> dict[str, Measurement]:
        """Every set now, by name; the first call is what the base is like."""
        measured = self.prober.measure() if self.enabled else {}
        self.first = self.first or measured
        return measured

    def finite(self, measured: dict[str, Measurement]) -> bool:
        """Whether every loss of every set, guarded or not, is a number."""
        return all(bool(np.isfinite(of.losses).all()) for of in measured.values())

    def compare(self, phase: Phase, measured: dict[str, Measurement]) -> list[Comparison]:
        """The sets that this phase guards, against the last good state and the phase's start."""
        if not self.enabled:
            return []
        guarded = [ProbeSet(s.name, s.tolerance) for s in self.config.probes.sets if self._guards(phase, s)]
        losses, good, start = (
            {name: m.losses for name, m in of.items()}
            for of in (measured, phase.good.measurements, phase.start.measurements)
        )
        rollback = self.config.rollback
        return compare_all(guarded, losses, good, start, rollback.max_drift, rollback.confidence)

    def sets(self, phase: Phase, measured: dict[str, Measurement], comparisons: list[Comparison]) -> Sets:
        """Loss, reference (the last good state), rise, drift (since the phase's start), gates and patch norm of all."""
        compared = {comparison.name: comparison.as_fields() for comparison in comparisons}
        sets: Sets = {}
        for config in self.config.probes.sets if measured else []:
            now, name = measured[config.name], config.name
            reference, start = phase.good.measurements[name].loss, phase.start.measurements[name].loss
            sets[name] = {
                "loss": now.loss,
                "reference": reference,
                "rise": now.loss - reference,
                "drift": now.loss - start,
                "tolerance": config.tolerance,
                **compared.get(name, {}),
                "guarded": name in compared,
                "before": start,
                "base": self.first[name].loss,
                "gate": now.gate,
                "sparsity": now.sparsity,
                "patch_norm": now.patch_norm,
            }
        return sets

    def spreads(self, measured: dict[str, Measurement], layers: list[int]) -> dict[str, dict[int, list[float]]]:
        """How the gates are spread, by set and by the block that a sidecar follows."""
        return {name: dict(zip(layers, of.spreads, strict=True)) for name, of in measured.items() if of.spreads}

    def with_blocks(self, sets: Sets, measured: dict[str, Measurement]) -> Sets:
        """The same, with the loss of every block: what intervals between any two commits are made of."""
        return {
            name: {**values, "block_losses": [round(float(loss), 5) for loss in measured[name].losses]}
            for name, values in sets.items()
        }

    def _guards(self, phase: Phase, probe: ProbeSetConfig) -> bool:
        names = [config.name for config in self.config.phases]
        return probe.guard_after is None or names.index(probe.guard_after) < phase.index
