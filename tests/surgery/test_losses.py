"""`revpatch probe`: losses, perplexities and intervals of a patch, or of none, on one rank and on several."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import MadeUp, patch_tensors, taught
from ranks import RunServer
from toy import Toy
from transformers import AutoModelForCausalLM

from revpatch.evaluation.guard import student_t_quantile
from revpatch.evaluation.losses import losses_of, probe_losses
from revpatch.shards.shard_set import ShardSet

Make = Callable[..., MadeUp]


@pytest.fixture
def run(toy: Toy, make_run: Make) -> MadeUp:
    run = make_run()
    run.phase("first", patch_tensors(strength=0), taught(toy, "first"))
    return run


def test_the_base_alone_has_the_losses_of_a_plain_forward_pass(toy: Toy) -> None:
    base = AutoModelForCausalLM.from_pretrained(toy.base, dtype=torch.float32).eval()
    with ShardSet(toy.shards("first_probe")) as shards, torch.no_grad():
        tokens = torch.from_numpy(shards.read(np.arange(len(shards))))
        expected = [base(row[None], labels=row[None], use_cache=False).loss.item() for row in tokens]
    (found,) = probe_losses("none", [str(toy.shards("first_probe"))], base=str(toy.base))
    assert (found.name, found.blocks, found.gate, found.rise) == ("first_probe", len(expected), None, None)
    assert found.loss == pytest.approx(np.mean(expected), rel=1e-6)
    margin = student_t_quantile(0.95, len(expected) - 1) * np.std(expected, ddof=1) / math.sqrt(len(expected))
    assert found.low == pytest.approx(found.loss - margin, rel=1e-5)
    assert found.high == pytest.approx(found.loss + margin, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert (found.perplexity_low, found.perplexity_high) == pytest.approx((math.exp(found.low), math.exp(found.high)))


def test_a_patch_is_paired_with_its_base_alone(toy: Toy, run: MadeUp) -> None:
    places = [str(toy.shards(name)) for name in ("first_probe", "base_probe")]
    found = probe_losses(str(run.directory), places, blocks=9)
    for of, place in zip(found, places, strict=True):
        (alone,) = probe_losses("none", [place], base=str(toy.base), blocks=9)
        assert of.blocks == 9
        assert of.reference == pytest.approx(alone.loss, rel=1e-7)
        assert of.rise == pytest.approx(of.loss - alone.loss, rel=1e-4)
        assert of.rise_low is not None and of.rise_high is not None and of.low is not None and of.high is not None
        assert of.rise_low < of.rise < of.rise_high < 0
        assert of.gate is not None and 0 < of.gate < 1


@pytest.mark.parametrize("blocks", [11, 1])
def test_two_ranks_share_the_blocks_and_find_the_same(
    toy: Toy, run: MadeUp, server: RunServer, tmp_path: Path, blocks: int
) -> None:
    places = [str(toy.shards(name)) for name in ("first_probe", "base_probe")]
    output = tmp_path / "out"
    args = ["probe", "--patch", run.directory, "--shards", places[0], places[1], "--blocks", blocks, "--json"]
    assert server.run(*args, output=output, world=2) == [0, 0], output.read_text()
    found = json.loads(output.read_text())
    assert found["ranks"] == 2
    for of, alone in zip(found["sets"], probe_losses(str(run.directory), places, blocks=blocks), strict=True):
        expected = alone.as_fields()
        assert (alone.low is None) == (alone.rise_low is None) == (blocks == 1)
        assert of["blocks"] == expected["blocks"] == blocks
        for key in ("loss", "rise", "rise_low", "perplexity_high", "gate"):
            assert of[key] == (expected[key] if expected[key] is None else pytest.approx(expected[key], rel=1e-5))


def test_several_patches_of_one_base_are_held_against_the_first_and_diff_shows_them(
    toy: Toy, run: MadeUp, revpatch: Callable[..., Any]
) -> None:
    pair, place = (f"{run.directory}@start", f"{run.directory}@commit"), str(toy.shards("first_probe"))
    found = losses_of(pair, [place], blocks=5)
    (start,), (commit,) = (found[reference] for reference in pair)
    (alone,) = probe_losses(pair[1], [place], blocks=5)
    assert start.rise is None and commit.against == pair[0] and commit.loss == alone.loss
    assert commit.rise == pytest.approx(commit.loss - start.loss, rel=1e-5)  # the start is the base
    shown = revpatch("ledger", "diff", *pair, "--shards", place, "--blocks", "5", "--json").json()
    assert [shown["losses"][reference][0]["loss"] for reference in pair] == [start.loss, commit.loss]
    assert len(shown["layers"]) == 2
    printed = revpatch("ledger", "diff", *pair, "--shards", place, "--blocks", "5")
    assert printed.code == 0 and "cosine" in printed.out and f"against {pair[0]}" in printed.out


def test_the_command_shows_lines_or_json(toy: Toy, run: MadeUp, revpatch: Callable[..., Any]) -> None:
    shown = revpatch("probe", "--patch", f"{run.directory}@commit", "--shards", toy.shards("first_probe"))
    assert shown.code == 0 and "against the base alone" in shown.out and "perplexity" in shown.out
    twice = ["--shards", toy.shards("first_probe"), "--shards", toy.shards("first_probe")]
    result = revpatch("probe", "--patch", "none", "--base", toy.base, *twice, "--json")
    found = json.loads(result.out)
    assert (found["patch"], found["ranks"]) == ("none", 1)
    assert [of["name"] for of in found["sets"]] == ["first_probe", "first_probe-2"]
