"""Gates under a KV cache: past scores live in the cache itself, as extra layers.

A prefix gate needs wᵀx of every past token. Keeping it as one more layer of the transformers cache, a "key" of one head
and width one beside a "value" that is the padding mask, means that reordering (beam search), cropping (assisted
decoding) and repeating treat it exactly as they treat keys and values, with no code of ours.
"""

from __future__ import annotations

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


def gate_histories(cache: Cache, gates: Iterable[nn.Module], slot: int, slots: int, now: int) -> list[History] | None:
    """The histories of one sidecar's gates in a cache, or None if its gates need none.

    Args:
        cache: the cache, its keys and values already extended by this call's tokens.
        gates: the sidecar's gates.
        slot: which of the patch's sidecars this is.
        slots: how many there are.
        now: number of tokens of this call.

    Raises:
        ValueError: the cache is of a kind that can't grow by a layer, or was filled without this patch.
    """
    gates = list(gates)
    if any(isinstance(gate, SeqGate) for gate in gates):
        raise ValueError(
            "a SeqGate depends on the whole sequence, so past positions change with each new token and a KV cache "
            "can't hold them: call the model with use_cache=False, or train with gate: prefix"
        )
    if not any(isinstance(gate, PrefixGate) for gate in gates):
        return None
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"a prefix gate keeps its past in a DynamicCache, found {type(cache).__name__}: use that kind")
    first = getattr(cache, "revpatch_first_layer", None)
    if first is None:
        first = cache.revpatch_first_layer = len(cache.layers)
        cache.layers.extend(DynamicLayer() for _ in range(slots * len(gates)))
    histories: list[History] = []
    for index in range(len(gates)):
        layer = cache.layers[first + slot * len(gates) + index]
        past = cache.get_seq_length() - now
        if layer.get_seq_length() != past:
            raise ValueError(
                f"the cache holds {past} past tokens and the gates have seen {layer.get_seq_length()}: it was filled "
                "without this patch; start from an empty cache"
            )
        histories.append(CachedScores(layer))
    return histories
