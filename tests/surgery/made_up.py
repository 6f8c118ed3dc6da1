"""Runs that were never trained: a config, and a ledger of patches made up for the toy base. Milliseconds each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from toy import LAYERS, WIDTH, Toy, make_it_look_trained
from transformers import AutoModelForCausalLM

from revpatch.config import SidecarConfig
from revpatch.ledger.ledger import Ledger
from revpatch.patch.patched_model import Patch, attach, load_tensors, patch_state
from revpatch.shards.shard_set import ShardSet

Tensors = dict[str, Tensor]


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def patch_tensors(seed: int = 1, strength: float = 0.3, depth: int = LAYERS, **knobs: Any) -> Tensors:
    """A patch that looks trained; strength 0 is the identity."""
    torch.manual_seed(seed)
    patch = Patch(WIDTH, depth, SidecarConfig(**{"bottleneck": 4, **knobs}))
    return patch_state(make_it_look_trained(patch, seed, strength) if strength else patch)


def taught(
    toy: Toy, corpus: str, worse: bool = False, layer: int | None = None, start: Tensors | None = None
) -> Tensors:
    """A patch after a few steps that lower the loss on a corpus, or raise it; in all layers or in one."""
    base = AutoModelForCausalLM.from_pretrained(toy.base, dtype=torch.float32)
    patch = attach(base, SidecarConfig(bottleneck=4))
    load_tensors(patch, patch_tensors(strength=0) if start is None else start)
    learning = [p for name, p in patch.sidecars.named_parameters() if layer in (None, int(name[:2]))]
    optimizer = torch.optim.Adam(learning, lr=2e-2)
    with ShardSet(toy.shards(corpus)) as shards:
        tokens = torch.from_numpy(shards.read(np.arange(16)))
    for _ in range(12):
        optimizer.zero_grad()
        loss = base(tokens, labels=tokens, use_cache=False).loss
        (-loss if worse else loss).backward()
        optimizer.step()
    return patch_state(patch)


def plus(tensors: Tensors, change: float, seed: int, layer: int | None = None) -> Tensors:
    """The patch moved a little, in all layers or in one."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        moved[name] = tensor + change * noise if layer in (None, int(name[:2])) else tensor.clone()
    return moved


@dataclass
class MadeUp:
    """A run's folder, as it is filled."""

    directory: Path
    metadata: dict[str, Any]
    phases: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, directory: Path, toy: Toy, metadata: dict[str, Any], config: bool = True) -> MadeUp:
        """An empty run, with a config or without one."""
        directory.mkdir()
        if config:
            toy.config_file(directory, output_dir=str(directory), sidecar={"bottleneck": 4})
        return cls(directory, metadata)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.directory / "ledger")

    def phase(self, name: str, before: Tensors, after: Tensors, **metadata: Any) -> None:
        """A phase's start and its commit."""
        index = len(self.phases)
        self.phases.append(name)
        for kind, tensors in (("start", before), ("commit", after)):
            known = {"kind": kind, "phase": name, "phase_index": index, "step": 12}
            self.ledger.record(kind, index, name, 12, tensors, {**known, **self.metadata, **metadata})

    def commits(self, states: list[Tensors]) -> None:
        """The start of the first, and then commits alone."""
        ledger = self.ledger
        ledger.record("start", 0, "p0", 0, states[0], self.metadata)
        for index, tensors in enumerate(states[1:]):
            ledger.record("commit", index, f"p{index}", 1, tensors, self.metadata)
