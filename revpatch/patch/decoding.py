"""Gates under a KV cache: what they need of the past lives in the cache itself, as one extra layer.

A prefix gate needs the sum of wᵀx over every past token, and how many there were. The transformers cache gets one more
layer, whose "keys" are these sums after each token, one "head" a gate, and whose "values" are the counts. So reordering
(beam search), cropping (assisted decoding, which takes tokens back) and repeating treat them exactly as they treat keys
and values, with no code of ours; and a step reads the last sum, however long the past is.

A token gate needs nothing of the past, but the keys and values that its token attends to must be those of the patched
model. For it the extra layer has a mark for each token that the patch has read, so that a cache which holds others is
known, whichever the gate.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from revpatch.config import SidecarConfig
from revpatch.patch.gates import NO_CACHE, History


class Owner(Protocol):
    """What is asked of a patch here."""

    config: SidecarConfig
    layers: list[int]
    blocks: int


class PatchLayer(DynamicLayer):  # type: ignore[misc]
    """The patch's own layer of a cache: as long as the tokens that the patch has read."""

    # By this transformers knows a static cache, whose empty places it must mask; here the other layers have the say.
    is_compileable = True


class Marks(PatchLayer):
    """A mark for each token, (rows, 1, time, 1)."""

    def add(self, hidden: Tensor) -> None:
        """One for each token of hidden, (rows, now, d)."""
        marks = hidden.new_ones((len(hidden), 1, hidden.shape[1], 1), dtype=torch.bool)
        self.update(marks, marks)


class RunningSums(PatchLayer):
    """The sums of a patch's gates after each token, (rows, gates, time, 1), and the counts, (rows, 1, time, 1)."""

    gates = 0

    @property
    def half_way(self) -> bool:
        """Return whether the last call ended before all gates had asked."""
        return self.gates > 0 and len(self.totals) < self.gates

    def begin(self, gates: int, mask: Tensor | None, like: Tensor) -> None:
        """Gets ready for a call's tokens; its gates then ask for their means one after another.

        Args:
            gates: of the patch, of all sidecars.
            mask: (rows, now), 1 for real tokens; None is all real.
            like: (rows, now, d), on whose device the sums are held; in its dtype, but in float32 at least.
        """
        if mask is not None and mask.device.type == "cpu" and mask.all():
            mask = None  # one look for all gates
        rows, now = like.shape[:2]
        dtype = torch.promote_types(like.dtype, torch.float32)
        real = like.new_ones((rows, now), dtype=dtype) if mask is None else (mask != 0).to(like.device, dtype)
        self.count = real.cumsum(1) if now > 1 else real
        self.past: Tensor | None = None
        if self.get_seq_length():
            self.past = self.keys[:, :, -1]
            self.count = self.count + self.values[:, 0, -1]
        self.padding = None if mask is None else mask == 0
        self.gates = gates
        self.totals: list[Tensor | float] = []

    def mean(self, gate: int, scores: Tensor) -> Tensor:
        """See `History.mean`."""
        total = scores.to(self.count.dtype)
        if self.padding is not None:
            total = total.masked_fill(self.padding, 0)
        total = total.cumsum(1)
        if self.past is not None:
            total = total + self.past[:, gate]
        self._keep(gate, total)
        return total / self.count.clamp(min=1)

    def step_mean(self, gate: int, score: float) -> float:
        """`mean` of a single real token of one sequence, without gradients."""
        if gate == 0:
            past = [0.0] * self.gates if self.past is None else self.past.flatten().tolist()
            self.stepped = (past, float(self.count))
        past, count = self.stepped
        self._keep(gate, past[gate] + score)
        return (past[gate] + score) / count

    def _keep(self, gate: int, total: Tensor | float) -> None:
        """Once the last gate has asked, the cache's layer grows by this call's tokens."""
        assert gate == len(self.totals), "the gates ask in their order"
        self.totals.append(total)
        if len(self.totals) == self.gates:
            if isinstance(total, Tensor):
                totals = torch.stack(cast("list[Tensor]", self.totals), 1).unsqueeze(-1)
            else:
                totals = self.count.new_tensor(self.totals).view(1, -1, 1, 1)
            self.update(totals, self.count[:, None, :, None])


class CachedHistory:
    """The history of one gate: its place in the running sums."""

    def __init__(self, sums: RunningSums, gate: int) -> None:
        self.sums = sums
        self.gate = gate

    def mean(self, scores: Tensor) -> Tensor:
        """See `History.mean`."""
        return self.sums.mean(self.gate, scores)


class Past(NamedTuple):
    """What the gates of one sidecar know of the tokens before a call."""

    sums: RunningSums | None
    """None for gates that need no past."""
    first: int
    """The number of the sidecar's first gate in the sums."""
    gates: int

    @property
    def histories(self) -> list[History] | None:
        """One for each gate."""
        if self.sums is None:
            return None
        return [CachedHistory(self.sums, self.first + index) for index in range(self.gates)]


def past_of(cache: Cache, patch: Owner, layer: int, hidden: Tensor, mask: Tensor | None) -> Past:
    """Return what the gates of one sidecar know of the tokens before this call.

    Args:
        cache: the cache, its keys and values already extended by this call's tokens.
        patch: a cache belongs to the patch that filled it.
        layer: the block that the sidecar is after; blocks come in their order.
        hidden: (rows, now, d), the block's output.
        mask: (rows, now), 1 for real tokens; None is all real.

    Raises:
        ValueError: the gates see the future, or the cache is of a kind that can't grow by a layer, or it was filled
            without this patch; or it is offloaded.
    """
    kind, slot = patch.config.gate, patch.layers.index(layer)
    if kind == "seq":
        raise ValueError(NO_CACHE)
    gates = 2 if patch.config.placement == "coupled" else 1
    if slot == 0:
        _begin(cache, patch, gates * len(patch.layers), hidden, mask)
    sums = cast(RunningSums, cache.layers[cache.revpatch_layer]) if kind == "prefix" else None
    return Past(sums, slot * gates, gates)


def disown(cache: Cache) -> None:
    """Notes that the base, or gates held open, go on from a cache: until it is emptied it is no patch's any more."""
    if getattr(cache, "revpatch_owner", None) is not None:
        cache.revpatch_owner = None


def _begin(cache: Cache, patch: Owner, gates: int, hidden: Tensor, mask: Tensor | None) -> None:
    """Checks, at the first sidecar of a call, that the patch has read all that the cache holds, and notes this call."""
    if getattr(cache, "offloading", False):
        raise ValueError(
            f"the cache, a {type(cache).__name__}, is offloaded to the CPU layer by layer, and the patch's own layer "
            "in it would be fetched in the place of the first block's: take a cache that stays on the device, as "
            'cache_implementation "dynamic" or "static", or hold the gates "on" or "off"'
        )
    keeps = isinstance(cache, DynamicCache | StaticCache)
    if patch.config.gate == "prefix" and not keeps:
        raise ValueError(
            f"a prefix gate keeps its past in a DynamicCache or a StaticCache, found {type(cache).__name__}: use one "
            "of these kinds"
        )
    past, owner = _past_length(cache, hidden), getattr(cache, "revpatch_owner", None)
    if owner is None or owner() is not patch:
        _claim(cache, patch, past, keeps)
    if not keeps:
        if past and past != cache.revpatch_read:
            raise ValueError(_other_length(cache, past))
        cache.revpatch_read = past + hidden.shape[1]
        return
    layer = cache.layers[cache.revpatch_layer]
    if past != layer.get_seq_length():
        half_way = isinstance(layer, RunningSums) and layer.half_way
        raise ValueError(_half_way(patch) if half_way else _filled_without(past))
    if isinstance(layer, RunningSums):
        layer.begin(gates, mask, hidden)
    else:
        cast(Marks, layer).add(hidden)


def _past_length(cache: Cache, hidden: Tensor) -> int:
    return int(cache.get_seq_length()) - hidden.shape[1]


def _claim(cache: Cache, patch: Owner, past: int, keeps: bool) -> None:
    """Notes in an empty cache whose it is, and adds the patch's layer behind those of the blocks."""
    if past > 0:
        raise ValueError(_filled_without(past))
    if hasattr(cache, "revpatch_layer"):  # emptied with reset(), after another patch has used it
        del cache.layers[cache.revpatch_layer :]
    if keeps:
        # A DynamicCache made without a config grows layer by layer, in the middle of this very call.
        while len(cache.layers) < patch.blocks and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        cache.revpatch_layer = len(cache.layers)
        cache.layers.append(RunningSums() if patch.config.gate == "prefix" else Marks())
    # A weak reference: copying a cache must not copy the patch.
    cache.revpatch_owner = weakref.ref(patch)


def _filled_without(past: int) -> str:
    return (
        f"the cache holds {past} past tokens, and some of them were read without this patch (by the base, another "
        "patch or gates held open): start from an empty cache"
    )


def _other_length(cache: Cache, past: int) -> str:
    kind, read = type(cache).__name__, cache.revpatch_read
    return (
        f"the cache holds {past} past tokens, and at the end of the patch's last call there were {read}: "
        f"some were read without the patch or taken back, and a {kind} can't say which; start from an empty cache, or "
        "take a DynamicCache"
    )


def _half_way(patch: Owner) -> str:
    return (
        f"the last call with this cache did not reach the last of the model's {patch.blocks} blocks, and a prefix gate "
        "needs what all of them saw: take an assistant_model or prompt_lookup_num_tokens in place of "
        "assistant_early_exit; after an error, start from an empty cache"
    )
