"""What every method is given: the config that the product would run, and by it the same blocks in the same order."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_cells import Cell
from compare_tiers import ROOT, Tier
from numpy.typing import NDArray
from torch import Tensor, nn

from revpatch.config import Config
from revpatch.config.file import load_config
from revpatch.durable import sha256_of_file
from revpatch.evaluation.probe import Prober
from revpatch.shards.format import Manifest
from revpatch.shards.replay import ReplayMixture, bottom_k, write_replay
from revpatch.shards.shard_set import ShardSet
from revpatch.train.preflight import check

UNGUARDED = 1e6
"""Nats: no set rises by so much, so nothing is rolled back."""
RECIPE = {"ours": 1, "peers": 1}
"""Counted up when a method is run otherwise than before, so that what was measured then is measured anew."""


def config_data(tier: Tier, cell: Cell, output: Path) -> dict[str, Any]:
    """The product's config of a cell, without its overrides."""
    replay = {"own": tier.own[0], "old": tier.old_replay}.get(cell.knob("replay", "own"))
    every = tier.steps // tier.checks
    taught: list[dict[str, Any]] = [
        {"name": name, "shards": place(train), "steps": tier.steps} for name, (train, _) in tier.corpora.items()
    ]
    if cell.joint:
        parts = [{"shards": place(train)} for train, _ in tier.corpora.values()]
        taught = [{"name": "joint", "shards": parts, "steps": tier.steps * len(parts)}]
    data: dict[str, Any] = {
        "output_dir": str(output),
        "seed": cell.seed,
        "base": {"model": place(tier.base), "dtype": "float32", "block_size": tier.block},
        "sidecar": {"bottleneck": tier.bottleneck},
        "optimizer": {"lr": cell.lr, "warmup_steps": tier.warmup},
        "batch": {
            "new_blocks": tier.new_blocks,
            "replay_blocks": tier.replay_blocks if cell.replays else 0,
            "micro_blocks": tier.new_blocks + tier.replay_blocks,
        },
        "phases": taught,
        "probes": {
            "every": every,
            "sets": [
                {
                    "name": name,
                    "shards": place(shards),
                    "tolerance": UNGUARDED,
                    "max_blocks": tier.main_blocks if name in tier.main else tier.other_blocks,
                }
                for name, shards in tier.held_out.items()
            ],
        },
        "rollback": {"max_drift": UNGUARDED, "max_rollbacks": 0},
        "engine": {"kind": "accelerate"},
        "monitoring": {"every": min(10, tier.steps // 2), "samples": {"max_new_tokens": 0}},
    }
    if cell.replays:
        data["replay"] = {"base": place(str(replay)), "blocks_per_phase": 512}
        if not cell.distils:
            data["objective"] = {"distill_kl_weight": 0.0}
    return data


def config_of(tier: Tier, cell: Cell, output: Path) -> Config:
    """The product's config of a cell."""
    with tempfile.TemporaryDirectory() as folder:
        return load_config(write_config(tier, cell, output, Path(folder)), cell.overrides)


def write_config(tier: Tier, cell: Cell, output: Path, folder: Path) -> Path:
    """The file that `revpatch train` is given."""
    file = folder / "config.json"
    file.write_text(json.dumps(config_data(tier, cell, output)), encoding="utf-8")
    return file


def place(shards: str) -> str:
    """A path of the repository from wherever the tool is started."""
    return str(ROOT / shards)


def fingerprint(tier: Tier) -> dict[str, Any]:
    """What of a tier decides its results."""
    weights = sorted((ROOT / tier.base).glob("*.safetensors"))
    shards = [*tier.own, *(one for pair in tier.corpora.values() for one in pair), *tier.held_out.values()]
    names = sorted({*shards, *([tier.old_replay] if tier.old_replay else [])})
    return {
        "base": [sha256_of_file(file) for file in weights],
        "shards": {name: Manifest.read(Path(place(name))).digest for name in names},
    }


def key_of(tier: Tier, cell: Cell, facts: dict[str, Any]) -> dict[str, Any]:
    """All that decides the result of a cell.

    Args:
        facts: `fingerprint` of the tier.
    """
    config = config_of(tier, cell, Path("run")).model_dump(mode="json")
    sections = ("sidecar", "objective", "optimizer", "batch") if cell.family == "ours" else ("optimizer", "batch")
    digests = facts["shards"]
    settings: dict[str, Any] = {section: dict(config[section]) for section in sections}
    if cell.family != "ours":
        del settings["optimizer"]["gate_lr"]  # a peer has no gates
        settings["kl_weight"] = config["objective"]["distill_kl_weight"] if cell.distils else 0.0
    settings["probes"] = {
        name: [digests[shards], tier.main_blocks if name in tier.main else tier.other_blocks]
        for name, shards in tier.held_out.items()
    }
    settings["phases"] = [[name, digests[train], tier.steps] for name, (train, _) in tier.corpora.items()]
    if cell.distils and len(tier.corpora) > 1:
        settings["base_teaches"] = "what it wrote"  # one corpus has no other teacher
    if cell.replays:
        source = tier.own[0] if cell.knob("replay", "own") == "own" else str(tier.old_replay)
        settings["replay"] = [digests[source], config["replay"]["blocks_per_phase"]]
    return {
        "method": cell.method,
        "knobs": dict(cell.knobs),
        "lr": cell.lr,
        "seed": cell.seed,
        "recipe": RECIPE["ours" if cell.family == "ours" else "peers"],
        "base": facts["base"],
        "bottleneck": tier.bottleneck,
        "block": tier.block,
        "checks": tier.checks,
        "settings": settings,
    }


class Course:
    """The blocks of a run, phase after phase, as the product's trainer reads them.

    Args:
        config: the product's config; its shards are opened and checked as the trainer does.
        folder: where the samples of past phases are kept.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.plan = check(config, 1)
        self.replayed = [] if self.plan.replay_base is None else [self.plan.replay_base]
        self.first_step = 0

    def steps(self, index: int) -> Iterator[tuple[Tensor, Tensor | None, list[tuple[str, int]]]]:
        """New blocks, replayed blocks and the keys of these, of each step of a phase: (n, block) int64 each. When a
        phase is over, a sample of it is replayed by the later ones."""
        config, corpus, mixture = self.config, self.plan.phases[index], self.plan.mixtures[index]
        phase, batch = config.phases[index], config.batch
        replay = ReplayMixture(self.replayed, batch.replay_blocks, config.seed) if self.replayed else None
        seen: list[NDArray[np.int64]] = []
        for step in range(1, phase.steps + 1):
            ids = mixture.block_ids(step - 1)
            seen.append(ids)
            new = torch.from_numpy(corpus.read(ids))
            if replay is None:
                yield new, None, []
            else:
                tokens, keys = replay.read(self.first_step + step - 1)
                yield new, torch.from_numpy(tokens), keys
        if replay is not None:
            name = f"{index:03d}_{phase.name}"
            kept = bottom_k(config.seed, np.concatenate(seen), config.replay.blocks_per_phase)
            write_replay(corpus, kept, self.folder, name)
            self.replayed.append(ShardSet(self.folder / name))
        self.first_step += phase.steps

    def held_out(self, base: nn.Module) -> dict[str, NDArray[Any]]:
        """The blocks of each held-out set, those that the product measures: (blocks, block_size)."""
        return Prober(base, list(zip(self.config.probes.sets, self.plan.probes, strict=True)), 1).blocks
