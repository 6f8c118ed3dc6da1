"""Gates under a KV cache: past scores live in the cache itself, as extra layers.

A prefix gate needs wᵀx of every past token. Keeping it as one more layer of the transformers cache, a "key" of one head
and width one beside a "value" that is the padding mask, means that reordering (beam search), cropping (assisted
decoding) and repeating treat it exactly as they treat keys and values, with no code of ours.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from revpatch.patch.gates import History, PrefixGate, SeqGate


class CachedScores:
    """The past scores of one gate, in one extra layer of a cache."""

    def __init__(self, layer: DynamicLayer) -> None:
        self.layer = layer

    def extend(self, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """See `History.extend`."""
        now = scores.shape[1]
        keys, values = self.layer.update(scores[:, None, :, None], mask[:, None, :, None])
        past = keys.shape[-2] - now
        return keys[:, 0, :past, 0].sum(1, keepdim=True), values[:, 0, :past, 0].sum(1, keepdim=True)


def gate_histories(
    cache: Cache, gates: Iterable[nn.Module], slot: int, slots: int, now: int, owner: nn.Module, blocks: int
) -> list[History] | None:
    """The histories of one sidecar's gates in a cache, or None if its gates need none.

    Args:
        cache: the cache, its keys and values already extended by this call's tokens.
        gates: the sidecar's gates.
        slot: which of the patch's sidecars this is.
        slots: how many there are.
        now: number of tokens of this call.
        owner: the patch; a cache belongs to the patch that filled it.
        blocks: number of blocks of the base, each of which has a layer in the cache.

    Raises:
        ValueError: the gates see the future, or the cache is of a kind that can't grow by a layer, or it was filled
            without this patch.
    """
    gates = list(gates)
    if any(isinstance(gate, SeqGate) for gate in gates):
        raise ValueError(
            "a SeqGate depends on the whole sequence, so past positions change with each new token and a KV cache "
            "can't hold them: call the model with use_cache=False, or train with gate: prefix"
        )
    prefix = any(isinstance(gate, PrefixGate) for gate in gates)
    if prefix and not isinstance(cache, DynamicCache):
        raise ValueError(f"a prefix gate keeps its past in a DynamicCache, found {type(cache).__name__}: use that kind")
    filled_by = getattr(cache, "revpatch_owner", None)
    if filled_by is None or filled_by() is not owner:
        _claim(cache, slots * len(gates) if prefix else 0, now, owner, blocks)
    if not prefix:
        return None
    histories: list[History] = []
    for index in range(len(gates)):
        layer = cache.layers[cache.revpatch_first_layer + slot * len(gates) + index]
        past = cache.get_seq_length() - now
        if layer.get_seq_length() != past:
            raise ValueError(_filled_without(past, layer.get_seq_length()))
        histories.append(CachedScores(layer))
    return histories


def _claim(cache: Cache, extra: int, now: int, owner: nn.Module, blocks: int) -> None:
    """Notes in an empty cache whose it is, and adds the gates' layers behind those of the blocks."""
    past = int(cache.get_seq_length()) - now
    if past > 0:
        raise ValueError(_filled_without(past, 0))
    if hasattr(cache, "revpatch_first_layer"):  # emptied with reset(), after another patch has used it
        del cache.layers[cache.revpatch_first_layer :]
    if extra:
        # A DynamicCache made without a config grows layer by layer, in the middle of this very call.
        while len(cache.layers) < blocks and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        cache.revpatch_first_layer = len(cache.layers)
        cache.layers.extend(DynamicLayer() for _ in range(extra))
    # A weak reference: copying a cache must not copy the patch.
    cache.revpatch_owner = weakref.ref(owner)


def _filled_without(past: int, seen: int) -> str:
    return (
        f"the cache holds {past} past tokens and the gates have seen {seen}: it was filled without this patch; start "
        "from an empty cache"
    )
