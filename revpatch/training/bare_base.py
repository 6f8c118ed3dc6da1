"""What a base is and says without a patch: the sha256 of its weights, and of its logits on tokens that never change.

A run's journal keeps both as they were at its start and at its end, so that a later proof of removal has something to
hold the base of its own day against. Weights are compared anywhere. Kernels add in another order on another machine,
with other threads or at another alignment in memory, so logits are comparable only between equal `where`s.
"""

from __future__ import annotations

import hashlib
import platform

import torch
from torch import Tensor, nn

from revpatch.ledger.events import BareBase, ComputedAt
from revpatch.patch.patched_model import base_parameters, base_sha256

_ROWS, _TOKENS = 2, 16


def bare_base(model: nn.Module, weights: str | None = None) -> BareBase:
    """Return what the journal keeps of it.

    The model is bare, or its patch is disabled, and in eval mode. `weights` is the sha256 if it is known already.
    """
    return BareBase(
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        weights=weights or base_sha256(model),
        logits=logits_sha256(logits_of(model)),
        where=_where(model),
    )


def logits_of(model: nn.Module) -> Tensor:
    """(rows, tokens, vocabulary), of tokens that are the same everywhere."""
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    tokens = (torch.arange(_ROWS * _TOKENS).view(_ROWS, _TOKENS) * 7919 + 11) % vocabulary
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled kernels may add in another order
        logits: Tensor = model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits
    return logits


def logits_sha256(logits: Tensor) -> str:
    """The sha256 of their bits."""
    return hashlib.sha256(logits.cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _where(model: nn.Module) -> ComputedAt:
    alignments = [parameter.data_ptr() % 64 for _, parameter in base_parameters(model)]
    device = next(model.parameters()).device
    return ComputedAt(
        host=platform.node(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        alignment=hashlib.sha256(str(alignments).encode()).hexdigest()[:16],
    )
