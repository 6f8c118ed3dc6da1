"""Samples: texts for people, that change nothing of what is learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from toy import POSITIONS, Toy, make_it_look_trained

from revpatch.config import SamplesConfig, SidecarConfig
from revpatch.config.file import load_config
from revpatch.generate import MAX_PROMPTS, PROMPT_TOKENS, Sampler
from revpatch.ledger.ledger import Ledger
from revpatch.patch.patched_model import attach, patch_disabled
from revpatch.train.run import train_run
from revpatch.train.startup import load_frozen_base


def commits(run: Path) -> list[str]:
    return [entry.sha256 for entry in Ledger(run / "ledger", readonly=True).entries() if entry.kind == "commit"]


def test_commits_are_the_same_with_and_without_samples_and_tensorboard(toy: Toy, tmp_path: Path) -> None:
    phases = [{"name": "first", "shards": str(toy.shards("first")), "steps": 6}]
    sets = [{"name": "base", "shards": str(toy.shards("base_probe")), "tolerance": 0.5, "max_blocks": 4}]
    found = []
    for name, watched in (
        ("bare", {}),
        ("watched", {"tensorboard": True, "samples": {"max_new_tokens": 8}}),
    ):
        (tmp_path / name).mkdir()
        config = toy.config_file(tmp_path / name, phases=phases, probes={"sets": sets}, monitoring=watched)
        assert not train_run(load_config(config)).interrupted
        found.append(commits(tmp_path / name / "run"))
    assert found[0] == found[1] != []


def test_prompts_are_the_configs_or_taken_from_the_held_out_sets(toy: Toy, tmp_path: Path) -> None:
    of = toy.config(tmp_path).base
    base = load_frozen_base(of, torch.device("cpu"))
    make_it_look_trained(attach(base, SidecarConfig(bottleneck=8)))
    blocks = {f"set{i}": np.full((2, 60), 40 + i) for i in range(MAX_PROMPTS + 2)}
    drawn = Sampler(base, of, SamplesConfig(max_new_tokens=4), blocks)
    assert drawn.prompts == [[40 + i] * PROMPT_TOKENS for i in range(MAX_PROMPTS)]
    assert len(drawn.write()) == MAX_PROMPTS

    long = "the patch learns " * POSITIONS
    given = Sampler(base, of, SamplesConfig(prompts=["the patch", long], max_new_tokens=200), blocks)
    state = torch.get_rng_state()
    short, cut = given.write()
    assert torch.equal(torch.get_rng_state(), state), "no random number was drawn"
    assert given.write() == [short, cut]
    assert short.prompt == "the patch"
    assert cut.text, "a prompt that fills the model leaves room for a token"
    with patch_disabled(base):
        assert given.write()[0].text != short.text
