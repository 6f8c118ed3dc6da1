"""A small patch and its metadata, as an entry holds them."""

import torch

METADATA = {"phase": "wikitext", "step": 500, "parent": None, "probes": {"base": 3.25}, "layers": [0, 1]}


def a_patch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer_01.gate.weight": torch.randn(8, generator=generator),
        "layer_00.coupling.F": torch.randn(4, 6, generator=generator).to(torch.bfloat16),
        "layer_00.log_scale": torch.tensor([0.0]),
    }
