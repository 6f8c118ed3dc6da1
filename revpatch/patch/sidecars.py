"""A patch: the sidecars of one base, by block."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from revpatch.config import SidecarConfig
from revpatch.patch.sidecar import Sidecar


class Patch(nn.Module):
    """The sidecars of one patch, by block.

    Args:
        width: d, the base's width.
        blocks: number of blocks of the base.
        config: the knobs.

    Raises:
        ValueError: `config.layers` names a block that isn't there, or the width is odd.
    """

    def __init__(self, width: int, blocks: int, config: SidecarConfig) -> None:
        super().__init__()
        layers = list(range(blocks)) if config.layers == "all" else sorted(config.layers)
        if layers[-1] >= blocks:
            raise ValueError(f"sidecar.layers names block {layers[-1]}, and the base has blocks 0 to {blocks - 1}")
        self.config = config
        self.width = width
        self.blocks = blocks
        self.layers = layers
        self.sidecars = nn.ModuleDict({f"{layer:02d}": Sidecar(width, config) for layer in layers})

    def sidecar(self, layer: int) -> Sidecar | None:
        """The sidecar after block `layer`, or None."""
        return cast("Sidecar | None", self.sidecars._modules.get(f"{layer:02d}"))

    def log_scales(self) -> Tensor:
        """log s of every sidecar, (layers,)."""
        return torch.cat([cast(Sidecar, sidecar).coupling.log_scale for sidecar in self.sidecars.values()])
