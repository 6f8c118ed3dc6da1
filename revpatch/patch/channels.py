"""The size of each channel of a base's block outputs: what channel coordinates are made of (see sidecar.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revpatch.patch.families import body_of
from revpatch.patch.patched_model import Patch, active_patch, recording, switchboard
from revpatch.patch.sidecar import Sidecar, SidecarOutput

SMALLEST = 1e-3
"""Of a layer's median channel: a channel that is silent on the text must not be divided by nothing."""


@torch.no_grad()
def measure_channels(model: nn.Module, tokens: Tensor, rows: int = 8) -> None:
    """Measure c over some text, with the base alone, and give it to the patch that the model carries.

    A sequence's first token is left out: in most models its activations are huge. A patch without channel coordinates
    stays as it is. Measure before training: c belongs to the weights that were learned with it.

    Args:
        model: a patched model.
        tokens: (sequences, time) int64 of text that the base knows, without padding; time ≥ 2.
        rows: sequences in one forward pass.

    Raises:
        ValueError: the model carries no patch, the tokens have another shape, or a block's output is not finite.

    >>> import revpatch, torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> patch = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2))
    >>> revpatch.measure_channels(model, torch.arange(40).view(4, 10))
    >>> patch.sidecar(0).channels.shape
    torch.Size([8])
    """
    patch: Patch = switchboard(model).attached
    if patch.config.normalize != "channels":
        return
    if tokens.dim() != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise ValueError(f"tokens: expected (sequences, time) with time of 2 or more, found {tuple(tokens.shape)}")
    recorder = _MeanSquares()
    with active_patch(model, None), recording(model, recorder):
        for part in tokens.split(rows):
            body_of(model)(part.to(next(model.parameters()).device), use_cache=False)
    for layer in patch.layers:
        sizes = (recorder.sums[layer] / (len(tokens) * (tokens.shape[1] - 1))).sqrt()
        if not bool(torch.isfinite(sizes).all()) or not float(sizes.median()) > 0:
            raise ValueError(f"the output of the base's block {layer} has channels of size {sizes.median():g}")
        sidecar = patch.sidecar(layer)
        assert isinstance(sidecar, Sidecar) and sidecar.channels is not None
        sidecar.channels.copy_(sizes.clamp(min=SMALLEST * float(sizes.median())))


class _MeanSquares:
    """Adds up the squares of each block's output, (d,) float64, by layer."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}

    def measure(self, output: SidecarOutput) -> tuple[Tensor, ...]:
        raise AssertionError("channels are measured without a patch")

    def record(self, layer: int, hidden: Tensor, measured: tuple[Tensor, ...]) -> None:
        raise AssertionError("channels are measured without a patch")

    def record_plain(self, layer: int, hidden: Tensor) -> None:
        squares = hidden[:, 1:].float().square().sum((0, 1)).double()
        self.sums[layer] = squares + self.sums.get(layer, 0.0)
