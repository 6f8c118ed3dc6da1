"""The sections of a config that say what is learned: the base, its sidecars, and the objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from revpatch.config.section import NonNegative, Positive, PositiveFloat, Section, Text, Weight


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
