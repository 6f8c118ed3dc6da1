"""The sections of a config: every key with its type, unit, range and default. Unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator


def _something(text: str) -> str:
    """Return the text; raises ValueError for one that can name nothing, as a path or a column."""
    if not text.strip():
        raise ValueError("is empty; give a value, or remove the key")
    if "\0" in text:
        raise ValueError("holds a NUL, which no name has; take it out")
    return text


Text = Annotated[str, AfterValidator(_something)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
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

    model: Text
    """Hugging Face name or a local folder, as `AutoModelForCausalLM.from_pretrained` takes it."""
    revision: Text | None = None
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
    """The gated sidecar after each block. The defaults are argued in docs/design/MATHS.md."""

    bottleneck: Positive = 64
    """r, the inner width of F and G."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """Nonlinearity of F and G."""
    init_scale: PositiveFloat = 1.0
    """s at the start; the last projections are zero, so the patch begins as the identity at any scale."""
    normalize: Literal["channels", "rms", "none"] = "channels"
    """What the gate, F and G see: the RMS norm of the block's output with each channel divided by its size over some of
    the base's own text (the change is multiplied by it again), the plain RMS norm, or the output as it is."""
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
    distill_kl_weight: Weight = 8.0
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

    cache_gb: Weight = 1.0
    """CPU memory a rank for its last hidden states, in 10⁹ bytes; what has no room is computed anew each time."""


class OptimizerConfig(Section):
    """AdamW, with warm-up and decay anew in each phase."""

    lr: PositiveFloat = 6.0e-3
    """Peak learning rate of F, G and log s."""
    gate_lr: PositiveFloat = 1.5e-2
    """Peak learning rate of the gates."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Decay of the first and second moments."""
    weight_decay: Weight = 0.0
    """Decoupled weight decay; gates and scales are exempt."""
    warmup_steps: NonNegative = 100
    """Optimizer steps of linear warm-up at the start of each phase."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up; the cosine ends at zero with the phase's last step."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global L2 norm."""


SELF = "self"
"""The `replay.base` that stands for text of the base's own."""


class BatchConfig(Section):
    """Blocks per optimizer step."""

    new_blocks: Positive = 32
    """New blocks per optimizer step over all ranks; also the number of lanes."""
    replay_blocks: NonNegative = 8
    """Replayed blocks per optimizer step over all ranks."""
    micro_blocks: Positive = 5
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
    """What is replayed."""

    base: Text = SELF
    """What is replayed from phase 1 on: `self`, text that the unpatched base writes by itself before the first step;
    or shards of text that it knows. `./self` is a folder of that name. The base writes a held-out part too, which is
    a guarded probe set named `own_text`; both are kept in `build.folder`, for all runs of that base."""
    own_blocks: Positive = 512
    """Blocks that the base writes to be replayed; it writes an eighth as many, at least 16, to be held out."""
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
    shard_cache: Text | None = "~/.cache/revpatch/shards"
    """Folder on local disk for shards that lie elsewhere, shared by all processes of a machine."""
    shard_cache_gb: PositiveFloat = 20.0
    """Size that the shard cache may reach, in 10⁹ bytes."""


class BuildConfig(Section):
    """How the shards of a raw source are built on first use, by rank 0, with the base's tokenizer and block_size."""

    folder: Text = "data/built"
    """Folder in which they are kept, each set in a folder named after its source and how it was built; and the text
    that a base writes by itself."""
    text_column: Text = "text"
    """Field or column that holds the text."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the documents held out of a source that both a phase (or replay) and a probe set name: the one gets
    the training side, the other the held-out side."""


class WeightedShards(Section):
    """One part of a mixture."""

    shards: Text
    """Shards of this part."""
    weight: PositiveFloat = 1.0
    """Share of the phase's new blocks, relative to the other parts' weights."""


class PhaseConfig(Section):
    """One new corpus."""

    name: Name
    """Name of the phase; it names the files of the ledger."""
    shards: Text | Annotated[list[WeightedShards], Field(min_length=1)]
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
    """What a killed run resumes from."""

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
    """Texts to continue; none takes a few tokens of each held-out set."""
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
