"""Activation functions of the frozen base that keep their input alone for the backward pass.

GPT-2's GELU is written out in transformers as eight elementwise steps, and autograd keeps what four of them need: more
bytes than all else that a frozen block keeps. Here the same steps give the same bits, and the backward pass is the one
fused kernel of the tanh approximation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

_C = math.sqrt(2.0 / math.pi)


class _TanhGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _tanh_gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")
        return out


def _tanh_gelu(x: Tensor) -> Tensor:
    """As `NewGELUActivation` computes it, operation by operation, without its temporaries."""
    inner = torch.pow(x, 3.0).mul_(0.044715)
    inner = torch.add(x, inner, out=inner).mul_(_C).tanh_().add_(1.0)
    return (0.5 * x).mul_(inner)


class LeanTanhGelu(nn.Module):
    """0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), the same bits as `NewGELUActivation`; any shape, any float dtype."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _TanhGelu.apply(x)
        return out


def make_lean(base: nn.Module) -> int:
    """Replaces the written-out GELUs of a frozen base, in place; returns how many there were."""
    found = [
        (module, name)
        for module in base.modules()
        for name, child in module.named_children()
        if type(child) is NewGELUActivation
    ]
    for module, name in found:
        setattr(module, name, LeanTanhGelu())
    return len(found)
