"""Every knob of a run, in one place: strict, with units, readable without torch.

A config is a YAML or JSON file (`revpatch.config.file` reads it). Unknown keys, wrong types and combinations that can't
work are refused here, before any process group is formed; what needs the shards themselves (fingerprints, block sizes,
enough blocks for the lanes) is checked in `revpatch.train.preflight`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from revpatch.config.sections import (
    SELF,
    BaseConfig,
    BatchConfig,
    BuildConfig,
    ConfigError,
    EngineConfig,
    MonitoringConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PhaseConfig,
    ProbesConfig,
    ProbeSetConfig,
    ReplayConfig,
    RollbackConfig,
    SamplesConfig,
    Section,
    SidecarConfig,
    SnapshotConfig,
    StreamConfig,
    TeacherConfig,
    Text,
    WeightedShards,
)

__all__ = [
    "OWN_TEXT",
    "SELF",
    "BaseConfig",
    "BatchConfig",
    "BuildConfig",
    "Config",
    "ConfigError",
    "EngineConfig",
    "MonitoringConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "ProbeSetConfig",
    "ProbesConfig",
    "ReplayConfig",
    "RollbackConfig",
    "SamplesConfig",
    "Section",
    "SidecarConfig",
    "SnapshotConfig",
    "StreamConfig",
    "TeacherConfig",
    "WeightedShards",
]

OWN_TEXT = "own_text"
"""The probe set of held-out text that the base has written itself."""


class Config(Section):
    """A run."""

    output_dir: Text
    """Folder of the run. A run that is there already is resumed, if it is this one."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the sidecars' start, the order of the data and the replay."""
    base: BaseConfig
    sidecar: SidecarConfig = SidecarConfig()
    teacher: TeacherConfig = TeacherConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    replay: ReplayConfig = ReplayConfig()
    stream: StreamConfig = StreamConfig()
    build: BuildConfig = BuildConfig()
    phases: Annotated[list[PhaseConfig], Field(min_length=1)]
    """The corpora, in the order in which they are learned."""
    probes: ProbesConfig = ProbesConfig()
    rollback: RollbackConfig = RollbackConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    engine: EngineConfig = EngineConfig()
    monitoring: MonitoringConfig = MonitoringConfig()

    @property
    def replays_own_text(self) -> bool:
        """Return whether what is replayed from phase 1 on is text that the base writes by itself."""
        return bool(self.batch.replay_blocks) and self.replay.base == SELF

    def with_own_text(self, folder: str) -> Config:
        """The same with that text named, once the base has written it: `folder` is replayed, and its held-out part in
        `folder`_probe is a probe set that is guarded from the start."""
        default = ProbeSetConfig(name=OWN_TEXT, shards=f"{folder}_probe")
        tolerance = min(default.tolerance, self.rollback.max_drift)  # one above it would never apply
        sets = [*self.probes.sets, default.model_copy(update={"tolerance": tolerance})]
        named = {
            "replay": self.replay.model_copy(update={"base": folder}),
            "probes": self.probes.model_copy(update={"sets": sets}),
        }
        return self.model_copy(update=named)

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Config:
        for key, names in (
            ("phases", [p.name for p in self.phases]),
            ("probes.sets", [s.name for s in self.probes.sets]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{key}: the name {twice[0]!r} is used twice; give each its own")
        return self

    @model_validator(mode="after")
    def _engine_reads_its_file(self) -> Config:
        if self.engine.kind == "accelerate" and self.engine.deepspeed is not None:
            raise ValueError(
                f"engine.deepspeed = {self.engine.deepspeed} has no effect with engine.kind = accelerate: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _probes_can_guard(self) -> Config:
        phases = [phase.name for phase in self.phases]
        for probe in self.probes.sets:
            if probe.tolerance > self.rollback.max_drift:
                raise ValueError(
                    f"probes.sets {probe.name!r}: tolerance = {probe.tolerance} is more than rollback.max_drift = "
                    f"{self.rollback.max_drift} and would never apply: raise max_drift, or lower the tolerance"
                )
            if probe.guard_after is not None and probe.guard_after not in phases:
                raise ValueError(
                    f"probes.sets {probe.name!r}: guard_after = {probe.guard_after!r} is no phase; phases are {phases}"
                )
        return self

    @model_validator(mode="after")
    def _replay_is_whole(self) -> Config:
        replays = (
            self.objective.replay_loss_weight or self.objective.distill_kl_weight or self.objective.stats_drift_weight
        )
        if self.batch.replay_blocks and not replays:
            raise ValueError(
                f"batch.replay_blocks = {self.batch.replay_blocks}, but every weight on replay is 0 "
                "(replay_loss_weight, distill_kl_weight, stats_drift_weight): set one, or batch.replay_blocks to 0"
            )
        if not self.batch.replay_blocks and self.replay.base != SELF:
            raise ValueError("replay.base is given, but batch.replay_blocks = 0: raise it, or leave out replay.base")
        return self

    @model_validator(mode="after")
    def _own_text_has_its_name(self) -> Config:
        if self.replays_own_text and OWN_TEXT in [probe.name for probe in self.probes.sets]:
            raise ValueError(
                f"probes.sets: the name {OWN_TEXT!r} is that of the held-out text that the base writes itself, while "
                f"replay.base = {SELF}: choose another name"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Config:
        for phase in self.phases:
            if self.optimizer.warmup_steps >= phase.steps:
                raise ValueError(
                    f"optimizer.warmup_steps = {self.optimizer.warmup_steps} leaves phase {phase.name!r} of "
                    f"{phase.steps} steps no step at the full rate: choose fewer"
                )
        return self
