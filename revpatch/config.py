"""Every knob of a run, in one place: strict, with units, readable without torch.

A config is a YAML or JSON file (`revpatch.config_file` reads it). Unknown keys, wrong types and combinations that can't
work are refused here, before any process group is formed; what needs the shards themselves (fingerprints, block sizes,
enough blocks for the lanes) is checked in `revpatch.training.preflight`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]


class ConfigError(ValueError):
    """A config that can't be used; the message names the file, every wrong key, what was found and what to do."""


class Section(BaseModel):
    """Base of all sections: no unknown keys, no silent conversion of types, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class BaseConfig(Section):
    """The frozen base model."""

    model: str
    """Hugging Face name or a local folder, as `AutoModelForCausalLM.from_pretrained` takes it."""
    revision: str | None = None
    """Revision (branch, tag or commit) of a hub model; null is the default branch."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type in which the base is stored and run. The sidecars are float32 in either case."""
    block_size: Positive = 1024
    """Tokens a block; must be that of the shards and at most what the base can read."""
    compile: bool = False
    """Compile the base's blocks with torch.compile."""
    activation_checkpointing: bool = False
    """Recompute each base block in the backward pass (non-reentrant) instead of keeping its activations."""


class SidecarConfig(Section):
    """The gated sidecar after each block. The defaults are argued in docs/DESIGN.md."""

    bottleneck: Positive = 64
    """r, the inner width of F and G."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """Nonlinearity of F and G."""
    init_scale: PositiveFloat = 1.0
    """s at the start; the last projections are zero, so the patch begins as the identity at any scale."""
    normalize: Literal["rms", "none"] = "rms"
    """Parameter-free RMS norm on what the gate, F and G see."""
    gate: Literal["prefix", "seq", "token"] = "prefix"
    """Gate on the mean of the prefix (causal), of the whole sequence (sees the future), or on each token (causal)."""
    placement: Literal["residual", "coupled"] = "residual"
    """Gate around the coupling, h = u + g·(C(u) − u), or inside of it (inverted in closed form)."""
    layers: Literal["all"] | list[NonNegative] = "all"
    """Indices of the blocks that get a sidecar."""
    check_invertibility: bool = True
    """Test at start-up that the map in use can be inverted, and log the error."""

    @field_validator("layers")
    @classmethod
    def _layers_are_distinct(cls, layers: Literal["all"] | list[int]) -> Literal["all"] | list[int]:
        if layers != "all" and (not layers or len(set(layers)) != len(layers)):
            raise ValueError(f"needs at least one block and no block twice, found {layers}")
        return layers


class ObjectiveConfig(Section):
    """Weights of the terms of the loss; the names are those under which each term is logged."""

    replay_loss_weight: Weight = 1.0
    """Weight of the LM loss on replayed blocks."""
    distill_kl_weight: Weight = 1.0
    """Weight of T²·KL(teacher ‖ student) on replayed blocks."""
    distill_temperature: PositiveFloat = 1.0
    """T, the temperature of both distributions in the KL."""
    gate_l1_weight: Weight = 0.0
    """Weight of the mean gate over tokens and layers."""
    patch_l2_weight: Weight = 0.0
    """Weight of the mean ‖h − u‖² over tokens and layers."""
    scale_l2_weight: Weight = 1.0e-3
    """Weight of the mean (log s − log s₀)² over layers."""
    stats_drift_weight: Weight = 0.0
    """Weight of the squared distance of the block outputs' mean and deviation on replay from the teacher's."""


class TeacherConfig(Section):
    """What is kept of what the teacher says of replayed blocks, until the next commit."""

    cache_gb: Annotated[float, Field(ge=0)] = 1.0
    """CPU memory a rank for its last hidden states, in 10⁹ bytes; 0 computes them anew each time."""
    spill: str | None = None
    """Folder on local disk for what the memory has no room for; null keeps none there."""
    spill_gb: PositiveFloat = 10.0
    """Size a rank that the spill may reach, in 10⁹ bytes."""


class OptimizerConfig(Section):
    """AdamW, with warm-up and decay anew in each phase."""

    lr: PositiveFloat = 6.0e-3
    """Peak learning rate of F, G and log s."""
    gate_lr_factor: PositiveFloat = 5.0
    """The gates learn at lr times this."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Decay of the first and second moments."""
    eps: PositiveFloat = 1.0e-8
    """Added to the root of the second moment."""
    weight_decay: Weight = 0.0
    """Decoupled weight decay; gates and scales are exempt."""
    warmup_steps: NonNegative = 100
    """Optimizer steps of linear warm-up at the start of each phase."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up; the cosine ends at zero with the phase's last step."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global L2 norm."""


class BatchConfig(Section):
    """Blocks per optimizer step."""

    new_blocks: Positive = 32
    """New blocks per optimizer step over all ranks; also the number of lanes."""
    replay_blocks: NonNegative = 16
    """Replayed blocks per optimizer step over all ranks."""
    micro_blocks: Positive = 4
    """At most this many blocks, new and replayed together, go through the model at once on a rank."""

    def accumulation(self, world: int) -> int:
        """Micro-batches per optimizer step on each of `world` ranks: the fewest that split new and replay evenly.

        Raises:
            ConfigError: the blocks can't be split over the ranks, or into micro-batches this small.
        """
        for key, blocks in (("batch.new_blocks", self.new_blocks), ("batch.replay_blocks", self.replay_blocks)):
            if blocks % world:
                raise ConfigError(
                    f"{key} = {blocks} can't be split evenly over {world} ranks ({blocks} % {world} = "
                    f"{blocks % world}): choose a multiple of {world}, or another number of ranks"
                )
        new, replay = self.new_blocks // world, self.replay_blocks // world
        for steps in range(1, new + 1):
            if new % steps == 0 and replay % steps == 0 and (new + replay) // steps <= self.micro_blocks:
                return steps
        raise ConfigError(
            f"batch.micro_blocks = {self.micro_blocks}: {new} new and {replay} replayed blocks a rank can't be split "
            f"into equal micro-batches of at most {self.micro_blocks} blocks; raise micro_blocks, or choose new_blocks "
            "and replay_blocks with a larger common divisor"
        )


class ReplayConfig(Section):
    """What is rehearsed."""

    base: str | None = None
    """Shards of the base model's own distribution, rehearsed from phase 1 on."""
    blocks_per_phase: Positive = 4096
    """Blocks kept of each phase (a bottom-k sample) for the phases after it."""


class StreamConfig(Section):
    """How blocks are read.

    Wherever the config names `shards`, that is a folder built by `revpatch shards build`; the URL of such a folder
    (https://..., s3://..., or what else fsspec knows); `pipe:COMMAND` with {name} in it for the file's name; or a raw
    source (.txt, .jsonl, .parquet, hf:..., wds:..., a folder or glob of files), whose shards are built on first use.
    """

    on_error: Literal["stop", "quarantine"] = "stop"
    """A broken shard stops the run, or is taken out for all ranks alike and written in the journal."""
    shuffle_blocks: Positive = 8192
    """Blocks in the shuffling window."""
    shard_cache: str | None = "~/.cache/revpatch/shards"
    """Folder on local disk for shards that lie elsewhere, shared by all processes of a machine."""
    shard_cache_gb: PositiveFloat = 20.0
    """Size that the shard cache may reach, in 10⁹ bytes."""
    retries: NonNegative = 5
    """Attempts at fetching a shard after the first one has failed, with growing pauses."""


class BuildConfig(Section):
    """How the shards of a raw source are built on first use, by rank 0, with the base's tokenizer and block_size."""

    folder: str = "data/built"
    """Folder in which they are kept, each set in a folder named after its source and how it was built."""
    text_column: str = "text"
    """Field or column that holds the text."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the documents held out of a source that both a phase (or replay) and a probe set name: the one gets
    the training side, the other the held-out side."""
    workers: Positive | None = None
    """Processes that tokenise; null is one a CPU."""


class WeightedShards(Section):
    """One part of a mixture."""

    shards: str
    """Shards of this part."""
    weight: PositiveFloat = 1.0
    """Share of the phase's new blocks, relative to the other parts' weights."""


class PhaseConfig(Section):
    """One new corpus."""

    name: Name
    """Name of the phase; it names the files of the ledger."""
    shards: str | Annotated[list[WeightedShards], Field(min_length=1)]
    """Token shards, or a mixture of several sets with weights."""
    steps: Positive
    """Optimizer steps."""
    repeat: bool = True
    """Begin another epoch when the shards are used up; if false, steps must fit in one epoch."""

    @property
    def parts(self) -> list[WeightedShards]:
        """The sets of shards with their weights; one, unless the phase names a mixture."""
        return [WeightedShards(shards=self.shards)] if isinstance(self.shards, str) else self.shards


class ProbeSetConfig(Section):
    """One held-out set."""

    name: Name
    """Name under which its losses are logged."""
    shards: str
    """Token shards that no phase trains on."""
    tolerance: PositiveFloat = 0.03
    """Nats per token by which the loss may rise from one good state to the next."""
    guard_after: str | None = None
    """Name of the phase that teaches this corpus: the set is guarded after that phase, and only measured until then.
    Null guards it from the start."""
    max_blocks: Positive | None = None
    """Use so many blocks, evenly spread over the set; null is all of them."""


class ProbesConfig(Section):
    """Held-out losses, measured at each phase's start and end and every so many steps."""

    every: Positive = 500
    """Optimizer steps between probes."""
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


class LedgerConfig(Section):
    """The record of patches."""

    keep_good: Positive = 3
    """Newest `good` entries kept of each phase; start, rollback and commit entries are always kept."""


class SnapshotConfig(Section):
    """What a run that was killed goes on from."""

    every: Positive = 1000
    """Optimizer steps of a phase between snapshots; there is one at the end of each phase besides."""
    keep: Positive = 2
    """Newest snapshots that are kept."""


class EngineConfig(Section):
    """The distributed engine."""

    kind: Literal["deepspeed", "accelerate"] = "deepspeed"
    """DeepSpeed (ZeRO 0, 1 or 2), or plain data parallel through accelerate."""
    deepspeed: str | None = None
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
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in the base's dtype, 10¹² operations a second, from its data sheet; null shows no share."""


class Config(Section):
    """A run."""

    output_dir: str
    """Folder of the run. A run that is there already is gone on with, if it is this one."""
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
    ledger: LedgerConfig = LedgerConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    engine: EngineConfig = EngineConfig()
    monitoring: MonitoringConfig = MonitoringConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        for key, names in (
            ("phases", [p.name for p in self.phases]),
            ("probes.sets", [s.name for s in self.probes.sets]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{key}: the name {twice[0]!r} is used twice; give each its own")
        if self.engine.kind == "accelerate" and self.engine.deepspeed is not None:
            raise ValueError(
                f"engine.deepspeed = {self.engine.deepspeed} has no effect with engine.kind = accelerate: leave it out"
            )
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
        rehearses = (
            self.objective.replay_loss_weight or self.objective.distill_kl_weight or self.objective.stats_drift_weight
        )
        if self.batch.replay_blocks and self.replay.base is None:
            raise ValueError(
                "replay.base is missing: the first phase has no past phase to rehearse. Name shards of the base "
                "model's own distribution, or set batch.replay_blocks to 0 to train without replay"
            )
        if self.batch.replay_blocks and not rehearses:
            raise ValueError(
                f"batch.replay_blocks = {self.batch.replay_blocks}, but every weight on replay is 0 "
                "(replay_loss_weight, distill_kl_weight, stats_drift_weight): set one, or batch.replay_blocks to 0"
            )
        if not self.batch.replay_blocks and self.replay.base is not None:
            raise ValueError("replay.base is given, but batch.replay_blocks = 0: raise it, or leave out replay.base")
        for phase in self.phases:
            if self.optimizer.warmup_steps >= phase.steps:
                raise ValueError(
                    f"optimizer.warmup_steps = {self.optimizer.warmup_steps} leaves phase {phase.name!r} of "
                    f"{phase.steps} steps no step at the full rate: choose fewer"
                )
        return self
