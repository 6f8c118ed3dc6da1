"""The learning rate, and what of it each parameter gets."""

from __future__ import annotations

import math

import torch
from torch import nn

from revpatch.config import OptimizerConfig
from revpatch.patch.patched_model import Patch

EPS = 1.0e-8
"""Of AdamW: added to the root of the second moment."""


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step 1 ≤ step ≤ steps of a phase: linear warm-up, then a cosine to zero, or constant."""
    if step <= config.warmup_steps:
        return config.lr * (step / config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def make_optimizer(patch: Patch, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the sidecars in three groups, each with its share of the rate: projections, scales, gates.

    Only the projections' weights decay.
    """
    projections: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    gates: list[nn.Parameter] = []
    for name, parameter in patch.named_parameters():
        (gates if ".gates." in name else scales if name.endswith("log_scale") else projections).append(parameter)
    groups = [
        {"params": projections, "lr_factor": 1.0, "weight_decay": config.weight_decay},
        {"params": scales, "lr_factor": 1.0, "weight_decay": 0.0},
        {"params": gates, "lr_factor": config.gate_lr / config.lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=EPS, weight_decay=0.0, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives each group the rate times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
