"""What ranks sent each other, read off the profiler's record of torch.distributed on gloo."""

from __future__ import annotations

from typing import Any

import torch


def bytes_sent(record: Any) -> dict[str, int]:
    """Bytes of float32 that were handed to each collective.

    Args:
        record: of a `torch.profiler.profile(record_shapes=True)`, after it has ended.
    """
    sent: dict[str, int] = {}
    for event in record.events():
        if event.name.startswith("gloo:"):
            size = sum(4 * torch.Size(shape).numel() for shape in event.input_shapes if shape)
            sent[event.name] = sent.get(event.name, 0) + size
    return sent
