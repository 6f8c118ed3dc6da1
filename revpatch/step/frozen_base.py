"""How the frozen base runs in training: full blocks without a mask, less kept for the backward pass, and recorders.

Blocks are full, so no token is padding. Left to itself, transformers looks at every batch's positions for packed texts,
which makes the host wait for the GPU; an attention without a mask function looks at nothing, and the kernel is told to
be causal, its fused path. GPT-2's GELU, the gated MLP of LLaMA and Qwen and their RMS norms keep their inputs alone,
with the same bits.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.activations import NewGELUActivation, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from revpatch.patch.families import body_of
from revpatch.patch.sidecar import SidecarOutput


def with_own_code(function: Callable[..., Any], name: str) -> Any:
    """Return the function or bound method, with a new code object of that name."""
    if isinstance(function, types.MethodType):
        return types.MethodType(with_own_code(function.__func__, name), function.__self__)
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


GATE_BINS = 20


class LayerRecorder:
    """Collects, block by block, the gate, the size of the change and, if asked, the output's statistics.

    Args:
        stats_from: keep mean and deviation over time of the outputs of rows from this index on; None keeps none.
        gate_learns, change_learns: whether a gradient will be asked of the gate, and of the change. What is recomputed
            in the backward pass and has an output of which none is asked is never freed by torch (2.13).
    """

    def __init__(self, stats_from: int | None = None, gate_learns: bool = False, change_learns: bool = False) -> None:
        self.stats_from = stats_from
        self.gate_learns, self.change_learns = gate_learns, change_learns
        self.gates: list[Tensor] = []
        self.changes: list[Tensor] = []
        self.stats: list[Tensor] = []

    def measure(self, output: SidecarOutput) -> tuple[Tensor, ...]:
        """Mean gate, and mean over tokens of ‖h − u‖²: () and ()."""
        gate = output.gate if self.gate_learns else output.gate.detach()
        update = output.update if self.change_learns else output.update.detach()
        return gate.mean(), update.square().sum(-1).mean()

    def record(self, layer: int, hidden: Tensor, measured: tuple[Tensor, ...]) -> None:
        """See `Recorder.record`."""
        gate, change = measured
        self.gates.append(gate)
        self.changes.append(change)
        self.record_plain(layer, hidden)

    def record_plain(self, layer: int, hidden: Tensor) -> None:
        """See `Recorder.record_plain`."""
        if self.stats_from is not None:
            states = hidden[self.stats_from :]
            states = states.to(torch.promote_types(states.dtype, torch.float32))
            self.stats.append(torch.stack([states.mean(1), states.std(1, unbiased=False)]))

    def gate_mean(self) -> Tensor:
        """(layers,): mean gate over tokens."""
        return torch.stack(self.gates)

    def change_mean(self) -> Tensor:
        """(layers,): mean over tokens of ‖h − u‖²."""
        return torch.stack(self.changes)


class GateRecorder(LayerRecorder):
    """Keeps besides how each layer's gates are spread over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.spreads: list[Tensor] = []

    def measure(self, output: SidecarOutput) -> tuple[Tensor, ...]:
        """Of `LayerRecorder`, and the share of gates in each of `GATE_BINS` equal bins from 0 to 1: (GATE_BINS,)."""
        counts = torch.histc(output.gate.float(), GATE_BINS, 0.0, 1.0)
        return *super().measure(output), counts / output.gate.numel()

    def record(self, layer: int, hidden: Tensor, measured: tuple[Tensor, ...]) -> None:
        """See `Recorder.record`."""
        *others, spread = measured
        self.spreads.append(spread)
        super().record(layer, hidden, tuple(others))

    def spread(self) -> Tensor:
        """(layers, GATE_BINS): each layer's shares."""
        return torch.stack(self.spreads)


def stats_drift(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over layers and sequences of (‖μ − μ*‖² + ‖σ − σ*‖²)/d; each item is (2, rows, d): μ and σ over time."""
    assert len(student) == len(teacher)
    return torch.stack([(s - t).square().mean(-1).sum(0).mean() for s, t in zip(student, teacher, strict=True)]).mean()


MASKLESS = ("sdpa", "flash_attention_2", "flash_attention_3")
"""Attention implementations that are causal by themselves when they get no mask."""
_PREFIX = "revpatch_packed_"


def last_hidden_states(base: nn.Module, tokens: Tensor) -> Tensor:
    """Return the body's output, after the final norm: (rows, time) int64 to (rows, time, d).

    Args:
        base: a causal language model, patched or not.
        tokens: full blocks; with padding among them the result would be wrong.
    """
    with _no_mask(base):
        states: Tensor = body_of(base)(tokens, use_cache=False).last_hidden_state
    return states


@contextlib.contextmanager
def _no_mask(base: nn.Module) -> Iterator[None]:
    config: Any = base.config
    found = config._attn_implementation
    if found not in MASKLESS or _slides(config):  # these need their masks, and get them at the price of a wait
        yield
        return
    name = _PREFIX + found
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, AttentionInterface._global_mapping[found])
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = found


def _slides(config: Any) -> bool:
    """Return whether some layer attends to a window only."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


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
