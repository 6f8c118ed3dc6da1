"""Samples: texts for people, that change nothing of what is learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from toy import POSITIONS, Toy, make_it_look_trained

from revpatch.config import SamplesConfig, SidecarConfig
from revpatch.generate import MAX_PROMPTS, PROMPT_TOKENS, Sampler
from revpatch.patch.patched_model import attach, patch_disabled
from revpatch.train.startup import load_frozen_base


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
