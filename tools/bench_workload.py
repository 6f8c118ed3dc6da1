"""What bench.py times: the shape of the model, the tokens, the weights of the objective; the same for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from revpatch.config import BatchConfig, Config, ObjectiveConfig, OptimizerConfig, SidecarConfig
from revpatch.distributed.ranks import bfloat16_is_slow

SHAPES = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
    "demo": {"n_embd": 192, "n_layer": 4, "n_head": 4, "vocab_size": 4096, "n_positions": 256},
    "tiny": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 211, "n_positions": 64},
}
BOTTLENECK = {"gpt2": 64, "demo": 32, "tiny": 4}
REPLAY_WEIGHT = KL_WEIGHT = 1.0
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-4


def base_dtype(device: str = "cpu") -> torch.dtype:
    """Return the type of frozen bases by default: bfloat16, but float32 where this CPU is faster in that."""
    return torch.float32 if device == "cpu" and bfloat16_is_slow() else torch.bfloat16


def synchronize(device: str) -> None:
    """Wait until the device has done what was asked of it, so that a clock can be read."""
    if device == "cuda":
        torch.cuda.synchronize()


def name_of(dtype: torch.dtype) -> str:
    """As people write it: "float32"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Workload:
    """One full step: `new` and `replay` blocks of `block` tokens through a model of `shape`.

    `dtype` is that in which frozen bases are stored; what is trained is float32 everywhere. Ours splits a step into
    micro-batches of at most `micro_blocks` blocks, as the trainer does, and with a `backend` of torch.compile compiles
    the base's blocks and the loss's chunks, as base.compile does. Everything lives on `device`, "cpu" or "cuda".

    Raises ValueError for a step that is none, a block that the shape can't read, and blocks that can't be split.
    """

    shape: str
    new: int
    replay: int
    block: int
    dtype: torch.dtype
    micro_blocks: int = BatchConfig().micro_blocks
    device: str = "cpu"
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("new", "replay", "micro_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 1 or more blocks")
        positions = SHAPES[self.shape]["n_positions"]
        if not 2 <= self.block <= positions:
            raise ValueError(f"block = {self.block}: a model of the {self.shape} shape reads 2 to {positions} tokens")
        _ = self.accumulation

    @property
    def accumulation(self) -> int:
        """Micro-batches a step, as the trainer splits it on one rank."""
        batch = BatchConfig(new_blocks=self.new, replay_blocks=self.replay, micro_blocks=self.micro_blocks)
        return batch.accumulation(1)

    def config(self) -> GPT2Config:
        """Without dropout, which would make every loss another and cost the peers time."""
        shape = SHAPES[self.shape]
        end = shape["vocab_size"] - 1
        off = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        return GPT2Config(**shape, **off, initializer_range=0.05, bos_token_id=end, eos_token_id=end)

    def model(self, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
        """The pretrained model: random weights, the same at each call."""
        torch.manual_seed(0)
        return GPT2LMHeadModel(self.config()).to(self.device, dtype)  # type: ignore[arg-type]

    def tokens(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(new, block) and (replay, block) int64, the same on every device."""
        generator = torch.Generator().manual_seed(1 + seed)
        high = SHAPES[self.shape]["vocab_size"]
        both = torch.randint(high, (self.new + self.replay, self.block), generator=generator).to(self.device)
        return both[: self.new], both[self.new :]

    @property
    def sidecar(self) -> SidecarConfig:
        return SidecarConfig(bottleneck=BOTTLENECK[self.shape])

    @property
    def objective(self) -> ObjectiveConfig:
        """LM on new and replayed tokens, and the KL; no regularisers, as the peers have none."""
        return ObjectiveConfig(replay_loss_weight=REPLAY_WEIGHT, distill_kl_weight=KL_WEIGHT, scale_l2_weight=0.0)

    @property
    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(lr=LEARNING_RATE, betas=[0.9, 0.999])

    def run_config(self, engine: str, world: int = 1) -> Config:
        """Return the trainer's config of this step on so many ranks; nothing in it is read from disk."""
        batch = {"new_blocks": self.new * world, "replay_blocks": self.replay * world}
        return Config.model_validate(
            {
                "output_dir": "unused",
                "base": {"model": "unused", "block_size": self.block, "dtype": name_of(self.dtype)},
                "batch": {**batch, "micro_blocks": self.micro_blocks},
                "replay": {"base": "unused"},
                "phases": [{"name": "unused", "shards": "unused", "steps": 1000}],
                "engine": {"kind": engine},
            }
        )

    def __str__(self) -> str:
        s = SHAPES[self.shape]
        return (
            f"GPT-2 with {s['n_layer']} blocks of width {s['n_embd']}, vocabulary {s['vocab_size']}, random weights; "
            f"{self.new} new and {self.replay} replayed blocks of {self.block} tokens; frozen bases in "
            f"{name_of(self.dtype)}{'' if self.backend is None else f'; ours compiled by {self.backend}'}"
        )
