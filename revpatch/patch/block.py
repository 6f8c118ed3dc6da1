"""A block with a sidecar after it: that of the patch which the call runs with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, StaticCache
from transformers.utils.output_capturing import _active_collector

from revpatch.patch.decoding import disown, past_of
from revpatch.patch.sidecar import Sidecar, SidecarOutput
from revpatch.patch.sidecars import Patch
from revpatch.patch.step import step
from revpatch.patch.switchboard import Call, Switchboard


class Recorder(Protocol):
    """Sees what each sidecar does, in the forward pass."""

    def measure(self, output: SidecarOutput) -> tuple[Tensor, ...]:
        """What is to be recorded of a sidecar's output; a pure function, as it may be computed twice."""
        ...

    def record(self, layer: int, hidden: Tensor, measured: tuple[Tensor, ...]) -> None:
        """Sees the block's output after its sidecar, and what `measure` gave."""
        ...

    def record_plain(self, layer: int, hidden: Tensor) -> None:
        """Sees the output of a block without an active sidecar."""
        ...


class PatchedBlock(nn.Module):
    """A transformer block and, after it, the sidecar of the call's patch."""

    def __init__(self, block: nn.Module, layer: int, switchboard: Switchboard) -> None:
        super().__init__()
        self.block = block
        self.layer = layer
        # In a tuple, so that the sidecars are not registered as parameters of the base.
        self._switchboard = (switchboard,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)  # models read attributes of their blocks

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PatchedBlock:
        """What `to`, `cuda` and the like call: the sidecars of this block follow it to its device, in their dtype."""
        super()._apply(fn, recurse)
        device = next(self.block.parameters()).device
        for patch in self._switchboard[0].patches.values():
            if (sidecar := patch.sidecar(self.layer)) is not None:
                sidecar.to(device)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        board = self._switchboard[0]
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if board.checkpointing and cache is None and torch.is_grad_enabled():
            output = checkpoint(self.block, *args, use_reentrant=False, **kwargs)
        else:
            output = self.block(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        call = board.call()
        patch = call.patch
        if cache is not None and (patch is None or call.gate_open):
            disown(cache)
        sidecar = patch.sidecar(self.layer) if patch is not None else None
        if patch is None or sidecar is None:
            if call.recorder is not None:
                call.recorder.record_plain(self.layer, hidden)
            return output
        patched: tuple[Tensor, ...]
        if cache is not None and not call.gate_open:
            decode = _with_past_uncompiled if isinstance(cache, StaticCache) else _with_past
            patched = decode(call, patch, sidecar, self.layer, cache, hidden)
        else:
            patched = _without_past(call, sidecar, hidden, board.recompute_sidecars and cache is None)
        h = patched[0]
        if call.recorder is not None:
            call.recorder.record(self.layer, h, patched[1:])
        if self.block._forward_hooks:
            _hand_on(h)
        return (h, *output[1:]) if isinstance(output, tuple) else h


def _without_past(call: Call, sidecar: Sidecar, hidden: Tensor, recompute: bool) -> tuple[Tensor, ...]:
    """What the sidecar makes of a block's output, and what is recorded of it, where its gates have no past."""
    mask, gate_open, recorder = call.mask, call.gate_open, call.recorder

    def apply(hidden: Tensor) -> tuple[Tensor, ...]:
        result: SidecarOutput = sidecar(hidden, mask, None, gate_open)
        return (result.hidden, *(() if recorder is None else recorder.measure(result)))

    if not recompute or not torch.is_grad_enabled():
        return apply(hidden)
    patched: tuple[Tensor, ...] = checkpoint(apply, hidden, use_reentrant=False, preserve_rng_state=False)
    return patched


def _with_past(
    call: Call, patch: Patch, sidecar: Sidecar, layer: int, cache: Cache, hidden: Tensor
) -> tuple[Tensor, ...]:
    """The same in a call with a cache, which holds the gates' past."""
    past = past_of(cache, patch, layer, hidden, call.mask)
    if call.recorder is None and (h := step(sidecar, hidden, past.sums, past.first)) is not None:
        return (h,)
    result: SidecarOutput = sidecar(hidden, call.mask, past.histories)
    return (result.hidden, *(() if call.recorder is None else call.recorder.measure(result)))


# For static caches, around which `generate` compiles a model: what is kept of the past grows with each token, and must
# not lie in the memory of a CUDA graph, which its next run overwrites. Elsewhere the wrapper would only cost its time.
_with_past_uncompiled = torch.compiler.disable(
    _with_past, reason="the past of a patch's gates grows with each token: use fullgraph=False"
)


def _hand_on(h: Tensor) -> None:
    """Puts h in the place of u where transformers collects hidden states (`output_hidden_states`).

    Its hooks are on the base's own blocks, so what they have just collected is the state before the sidecar.
    """
    collected = (_active_collector.get() or {}).get("hidden_states")
    if collected and collected[-1] is not None:  # None is a state that the caller did not select
        collected[-1] = h
