"""The sections of a config that say how a run is watched and kept: probes, rollback, records, engine, monitoring."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from revpatch.config.section import Fraction, Name, NonNegative, Positive, PositiveFloat, Section, Text


class ProbeSetConfig(Section):
    """One held-out set."""

    name: Name
    """Name under which its losses are logged."""
    shards: Text
    """Token shards that no phase trains on."""
    tolerance: PositiveFloat = 0.03
    """Nats per token by which the loss may rise from one good state to the next."""
    guard_after: Text | None = None
    """Name of the phase that teaches this corpus: the set is guarded after that phase, and only measured until then.
    Null guards it from the start."""
    max_blocks: Positive | None = None
    """Use so many blocks, evenly spread over the set; null is all of them."""


class ProbesConfig(Section):
    """Held-out losses, measured at each phase's start and end and every so many steps."""

    every: Positive = 500
    """Optimizer steps between probes. In the first tens of steps of a phase old text suffers until the gates can tell
    it from new, so a probe there may roll back what would have come right by itself."""
    placement: Literal["rank0", "all"] = "rank0"
    """Rank 0 measures while the others wait, or every rank measures a share of the blocks: for many ranks."""
    sets: list[ProbeSetConfig] = []
    """The held-out sets."""


class RollbackConfig(Section):
    """When a probe regresses."""

    confidence: Fraction = 0.95
    """Confidence of the interval that must exclude zero."""
    max_drift: PositiveFloat = 0.06
    """Nats per token by which a guarded set may rise in all since its phase began."""
    max_rollbacks: NonNegative = 5
    """Rollbacks in a phase; the next regression ends the phase with its last good patch."""
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The learning rate is multiplied by this at each rollback, to the end of the phase."""


class SnapshotConfig(Section):
    """What a run that was killed goes on from."""

    every: Positive = 1000
    """Optimizer steps of a phase between snapshots; there is one at the end of each phase besides. The newest two are
    kept."""


class EngineConfig(Section):
    """The distributed engine."""

    kind: Literal["deepspeed", "accelerate"] = "deepspeed"
    """DeepSpeed (ZeRO 0, 1 or 2), or plain data parallel through accelerate."""
    deepspeed: Text | None = None
    """DeepSpeed's JSON file; null is ZeRO 0. Batch sizes, optimizer and precision are set by this config."""
    timeout_minutes: Annotated[float, Field(gt=0, le=10_080)] = 30.0
    """Ranks that wait longer than this for one another stop the run."""


class SamplesConfig(Section):
    """Short texts that are written greedily at the run's start and at each commit, for people to read."""

    prompts: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=8)] = []
    """Texts to go on from; none takes a few tokens of each held-out set."""
    max_new_tokens: NonNegative = 40
    """Tokens to write after each; 0 writes no samples."""


class MonitoringConfig(Section):
    """What people see."""

    every: Positive = 20
    """Optimizer steps between log lines; also how often the loss is checked to be finite."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    trackers: list[Literal["wandb", "mlflow"]] = []
    """Services that get the same numbers; their packages must be installed."""
    samples: SamplesConfig = SamplesConfig()
