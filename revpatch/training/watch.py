"""Rank 0's eye on the probes: measures them, compares them with what they were, and puts it down for the journal."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from torch import nn

from revpatch.config import Config, ProbeSetConfig
from revpatch.ledger.events import Readings
from revpatch.monitoring.doing import doing
from revpatch.stream.shard_set import ShardSet
from revpatch.training.guard import Comparison, ProbeSet, compare_all
from revpatch.training.launch import Peers
from revpatch.training.phase import Phase
from revpatch.training.probe import Measurement, Prober, put_together, reading_of

log = logging.getLogger("revpatch")


def in_words(sets: Readings) -> str:
    """Each set's loss, and its drift since the phase's start, for a line of the log."""
    return "  ".join(f"{name} {reading.loss:.4f} ({reading.drift:+.4f})" for name, reading in sets.items())


class Watch:
    """The probes of a run; rank 0 compares. With `probes.placement` "rank0" it measures too, and on the others
    everything is empty; with "all" every rank measures a share, and all have the whole.

    Args:
        config: the run's config.
        base: the patched base model.
        shards: of each probe set.
        peers: the other ranks.
    """

    def __init__(self, config: Config, base: nn.Module, shards: Sequence[ShardSet], peers: Peers) -> None:
        self.config, self.peers = config, peers
        self.shared = config.probes.placement == "all" and peers.world > 1
        sets = list(zip(config.probes.sets, shards, strict=True))
        share = (peers.rank, peers.world) if self.shared else (0, 1)
        self.prober = Prober(base, sets, 2 * config.batch.micro_blocks, share)
        self.first: dict[str, Measurement] = {}

    def measure(self) -> dict[str, Measurement]:
        """Every set now, by name; the first call is what the base is like. All ranks take part."""
        with doing("measuring the probe sets", log.info, self.peers.rank == 0) as far:
            if self.shared:
                measured = put_together(self.peers.gather(self.prober.measure(far)), self.prober.counts)
            else:
                measured = self.prober.measure(far) if self.peers.rank == 0 else {}
        self.first = self.first or measured
        return measured

    def finite(self, measured: dict[str, Measurement]) -> bool:
        """Whether every loss of every set, guarded or not, is a number."""
        return all(bool(np.isfinite(of.losses).all()) for of in measured.values())

    def compare(self, phase: Phase, measured: dict[str, Measurement]) -> list[Comparison]:
        """The sets that this phase guards, against the last good state and the phase's start."""
        if self.peers.rank != 0:
            return []
        guarded = [ProbeSet(s.name, s.tolerance) for s in self.config.probes.sets if self._guards(phase, s)]
        losses, good, start = (
            {name: m.losses for name, m in of.items()}
            for of in (measured, phase.good.measurements, phase.start.measurements)
        )
        rollback = self.config.rollback
        return compare_all(guarded, losses, good, start, rollback.max_drift, rollback.confidence)

    def sets(self, phase: Phase, measured: dict[str, Measurement], comparisons: list[Comparison]) -> Readings:
        """Loss, reference (the last good state), rise, drift (since the phase's start), gates and patch norm of all."""
        compared = {comparison.name: comparison for comparison in comparisons}
        sets: Readings = {}
        for config in self.config.probes.sets if measured else []:
            now, name = measured[config.name], config.name
            reference, start = phase.good.measurements[name].loss, phase.start.measurements[name].loss
            more = {"before": start, "base": self.first[name].loss, "sparsity": now.sparsity}
            sets[name] = reading_of(now, reference, start, config.tolerance, compared.get(name), **more)
        return sets

    def spreads(self, measured: dict[str, Measurement], layers: list[int]) -> dict[str, dict[int, list[float]]]:
        """How the gates are spread, by set and by the block that a sidecar follows."""
        return {name: dict(zip(layers, of.spreads, strict=True)) for name, of in measured.items() if of.spreads}

    def with_blocks(self, sets: Readings, measured: dict[str, Measurement]) -> Readings:
        """The same, with the loss of every block: what intervals between any two commits are made of."""
        return {
            name: reading.model_copy(update={"block_losses": [round(float(loss), 5) for loss in measured[name].losses]})
            for name, reading in sets.items()
        }

    def _guards(self, phase: Phase, probe: ProbeSetConfig) -> bool:
        names = [config.name for config in self.config.phases]
        return probe.guard_after is None or names.index(probe.guard_after) < phase.index
