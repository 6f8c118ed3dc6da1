"""Functions of the frozen base that keep their inputs alone for the backward pass.

GPT-2's GELU is written out in transformers as eight elementwise steps, and autograd keeps what four of them need: more
bytes than all else that a frozen block keeps. Here the same steps give the same bits, and the backward pass is the one
fused kernel of the tanh approximation. The gated MLP of LLaMA and Qwen keeps two tensors instead of three: SiLU of the
one is computed again. Their RMS norms keep their input as it is, not as the float32 in which they compute.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import NewGELUActivation, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

GATED = (LlamaMLP, Qwen2MLP, Qwen3MLP)
"""Modules that compute down(act(gate(x))·up(x))."""
NORMS = (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
"""Modules that compute weight·(x / √(mean x² + ε)), the brackets in float32 and rounded to the type of x."""
SLICE = 2**17
"""Elements that go through all steps of the GELU before the next ones on a CPU: what its second-level cache holds."""
_C = math.sqrt(2.0 / math.pi)


class _TanhGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.is_contiguous():
            return _tanh_gelu(x, torch.empty_like(x), torch.empty_like(x))
        out, inner = torch.empty_like(x), x.new_empty(min(SLICE, x.numel()))
        for part, result in zip(x.view(-1).split(SLICE), out.view(-1).split(SLICE), strict=True):
            _tanh_gelu(part, result, inner[: len(part)])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")
        return out


def _tanh_gelu(x: Tensor, out: Tensor, inner: Tensor) -> Tensor:
    """As `NewGELUActivation` computes it, operation by operation, into `out` and without its temporaries."""
    torch.pow(x, 3.0, out=inner).mul_(0.044715)
    torch.add(x, inner, out=inner).mul_(_C).tanh_().add_(1.0)
    return torch.mul(x, 0.5, out=out).mul_(inner)


class LeanTanhGelu(nn.Module):
    """0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), the same bits as `NewGELUActivation`; any shape, any float dtype."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _TanhGelu.apply(x)
        return out


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), functional.silu(gate).mul_(gradient)


class LeanGatedMLP(nn.Module):
    """down(silu(gate(x))·up(x)), the same bits and the same names of parameters as the module it takes them from."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            cast(nn.Module, getattr(mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(_SiluProduct.apply(self.gate_proj(x), self.up_proj(x)))
        return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return weight * _normalised(x, epsilon)[0].to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        normalised, inverse = _normalised(x, ctx.epsilon)
        pull = (gradient * weight).to(torch.float32)
        along = (pull * normalised).mean(-1, keepdim=True)
        return pull.sub_(normalised.mul_(along)).mul_(inverse).to(x.dtype), None, None


def _normalised(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / RMS(x) and 1 / RMS(x) over the last dimension in float32, operation by operation as transformers does it."""
    wide = x.to(torch.float32)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return wide * inverse, inverse


class LeanRMSNorm(nn.Module):
    """The RMS norm (Zhang and Sennrich, 2019) of `norm`, a module of `NORMS`: the same bits and the same parameter,
    which is frozen."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, norm.weight)
        self.variance_epsilon = cast(float, norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _RmsNorm.apply(x, self.weight, self.variance_epsilon)
        return out


def make_lean(base: nn.Module) -> int:
    """Replaces the written-out GELUs, the gated MLPs and the RMS norms of a frozen base, in place.

    Returns how many there were.
    """
    found = [
        (module, name, lean)
        for module in base.modules()
        for name, child in module.named_children()
        if (lean := _lean(child)) is not None
    ]
    for module, name, lean in found:
        setattr(module, name, lean)
    return len(found)


def _lean(module: nn.Module) -> nn.Module | None:
    if type(module) is NewGELUActivation:
        return LeanTanhGelu()
    if type(module) in GATED and isinstance(module.act_fn, nn.SiLU | SiLUActivation):
        return LeanGatedMLP(module)
    if type(module) in NORMS:
        return LeanRMSNorm(module)
    return None
