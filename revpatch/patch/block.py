"""A block with a sidecar after it, and which patch a call of the model runs with.

`set_patch` and `set_gate` choose for every thread, from the next call on. `active_patch`, `patch_disabled` and a
`generate` that runs hold a choice for the code inside them alone: for its thread or asyncio task, and what copies its
context. A call notes its choice and its mask when it begins, and its blocks read no other, whatever is switched.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, StaticCache
from transformers.utils.output_capturing import _active_collector

from revpatch.patch.cpu_decode import step
from revpatch.patch.decoding import disown, past_of
from revpatch.patch.padding import PaddingReader
from revpatch.patch.sidecar import Patch, Sidecar, SidecarOutput

SWITCHING = threading.RLock()
"""Held while patches are put on a model, chosen or taken off."""
GENERATE = "generate"


class Choice(NamedTuple):
    """A patch, or None for the base alone, and whether its gates are held at 1."""

    patch: Patch | None
    gate_open: bool


class Call(NamedTuple):
    """What the blocks are told of one call of the body."""

    patch: Patch | None
    gate_open: bool
    mask: Tensor | None
    """(batch, time), not 0 for real tokens; None is all real, or that no gate asks."""
    recorder: Any
    """A `Recorder`, or None."""
    outer: Call | None
    """The call in whose middle this one was made."""


class Held:
    """A choice that `what` holds for the code inside it."""

    def __init__(self, board: Switchboard, choice: Choice, what: str) -> None:
        self.board, self.choice, self.what = board, choice, what
        self.thread = threading.current_thread().name


_HELD: ContextVar[tuple[Held, ...]] = ContextVar("revpatch_held", default=())
"""Of all models, the innermost last."""


class Here(threading.local):
    """What one thread is doing with one model. A copy of the model knows nothing of it."""

    call: Call | None = None
    recorder: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (Here, ())


class Switchboard:
    """What the patched blocks of one model share."""

    def __init__(
        self,
        name: str,
        patch: Patch,
        trained: dict[str, bool],
        padding: PaddingReader,
        blocks: Callable[[nn.Module], Iterable[nn.Module]],
    ) -> None:
        self.patches = {name: patch}
        self.attached = patch
        """The chosen one of them."""
        self.choice = Choice(patch, False)
        """For calls that nothing holds another for."""
        self.held: list[Held] = []
        """All that are held now, by whichever thread."""
        self.here = Here()
        # Recompute base blocks in the backward pass; calls with a cache never do, as recomputing would grow the cache.
        self.checkpointing = False
        # Recompute what is inside the sidecars in the backward pass: it is little work, and many float32 copies.
        self.recompute_sidecars = True
        self.padding = padding
        self.blocks = blocks
        """Of the body, as they are now. No list of them, as a circle would keep their memory."""
        self.layers: list[int | None] = list(range(patch.blocks))
        self.required_grad = trained
        self.hooks: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """For copies: of what is held, a copied model knows nothing."""
        return {**self.__dict__, "held": []}

    def holding(self) -> Held | None:
        """Return what holds a choice for this code, innermost; None if nothing does."""
        return next((held for held in reversed(_HELD.get()) if held.board is self), None)

    def current(self) -> Choice:
        """Return what a call that begins now runs with.

        Raises:
            ValueError: another thread holds a choice, and it can't be known whether this call is meant to be under it.
        """
        if (held := self.holding()) is not None:
            return held.choice
        for other in tuple(self.held):
            if other.what != GENERATE:
                raise ValueError(
                    f"{other.what} is in force in the thread {other.thread!r}, and this call, in the thread "
                    f"{threading.current_thread().name!r}, doesn't say which patch it is to run with: enter "
                    "patch_disabled(model) or active_patch(model, patch) in this thread too"
                )
        return self.choice

    @contextlib.contextmanager
    def hold(self, what: str, choice: Choice | None = None) -> Iterator[None]:
        """Holds a choice for the code inside; None is the one that there is now.

        Raises:
            ValueError: as `current`.
        """
        with SWITCHING:
            held = Held(self, choice or self.current(), what)
            self.held.append(held)
        _HELD.set((*_HELD.get(), held))
        try:
            yield
        finally:
            _HELD.set(tuple(other for other in _HELD.get() if other is not held))
            self.held.remove(held)

    def begin_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook of the body: notes what this call's blocks are to know.

        Raises:
            ValueError: as `current`, or the blocks are not those that the patch was put on.
        """
        layers = [getattr(block, "layer", None) for block in self.blocks(module)]
        if layers != self.layers and layers != [None] * len(self.layers):  # while another thread attaches or detaches
            found = ", ".join("none" if layer is None else str(layer) for layer in layers)
            raise ValueError(
                "the model's blocks were moved or removed since the patch was put on it: expected blocks 0 to "
                f"{len(self.layers) - 1} in their order, found {found}: put them back, or load the model anew"
            )
        patch, gate_open = self.choice if not self.held else self.current()
        averages = patch is not None and not gate_open and patch.config.gate != "token"
        mask = self.padding(args, kwargs) if averages else None
        here = self.here
        here.call = Call(patch, gate_open, mask, here.recorder, here.call)

    def end_call(self, *_: Any) -> None:
        """A hook of the body, called after errors too."""
        if (call := self.here.call) is not None:
            self.here.call = call.outer

    def call(self) -> Call:
        """Return the call that is under way in this thread; for a block that is called by itself, one without a mask.

        Raises:
            ValueError: a block is computed anew in a backward pass, where nothing says what its call ran with.
        """
        if (call := self.here.call) is not None:
            return call
        if torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "a patched block is computed anew in the backward pass, where its call's mask and patch are not known "
                "any more: checkpoint the base's own blocks (model.gradient_checkpointing_enable()), not the patched "
                "ones"
            )
        return Call(*self.current(), None, self.here.recorder, None)


class Generate:
    """In the place of a patched model's `generate`: writes the whole text with the patch and gates of its beginning,
    whatever other threads switch meanwhile. Takes the model's weak reference, as a circle would keep its memory."""

    def __init__(self, model: nn.Module, board: Switchboard) -> None:
        self._model = weakref.ref(model)
        self._board = board

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._board.hold(GENERATE):
            return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        """The model's own, bound to it."""
        model: Any = self._model()
        if model is None:
            raise ReferenceError("the model whose generate this was is gone: keep the model itself")
        return type(model).generate.__get__(model)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model(), "board": self._board}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model, self._board = weakref.ref(state["model"]), state["board"]


class Recorder(Protocol):
    """Sees what each sidecar does, in the forward pass."""

    def measure(self, output: SidecarOutput) -> tuple[Tensor, ...]:
        """Return what is to be recorded of a sidecar's output; a pure function, as it may be computed twice."""
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
        """Return what `to`, `cuda` and the like call: the sidecars of this block follow it to its device, in their
        dtype."""
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
    """Return what the sidecar makes of a block's output, and what is recorded of it, where its gates have no past."""
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
