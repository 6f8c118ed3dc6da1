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
from revpatch.evaluation.losses import interval, losses_of, probe_losses
from revpatch.ledger.patch_file import write_entry
from revpatch.shards.shard_set import ShardSet

Make = Callable[..., MadeUp]


@pytest.fixture
def run(toy: Toy, make_run: Make) -> MadeUp:
    run = make_run()
    run.phase("first", patch_tensors(strength=0), taught(toy, "first"))
    return run


def plain_losses(toy: Toy, name: str) -> list[float]:
    """Each block by itself through Hugging Face's own loss, of the base alone."""
    base = AutoModelForCausalLM.from_pretrained(toy.base, dtype=torch.float32).eval()
    with ShardSet(toy.shards(name)) as shards, torch.no_grad():
        tokens = torch.from_numpy(shards.read(np.arange(len(shards))))
        return [base(row[None], labels=row[None], use_cache=False).loss.item() for row in tokens]


def test_the_base_alone_has_the_losses_of_a_plain_forward_pass(toy: Toy) -> None:
    expected = plain_losses(toy, "first_probe")
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


def test_one_block_has_no_interval(toy: Toy, run: MadeUp) -> None:
    (found,) = probe_losses(str(run.directory), [str(toy.shards("first_probe"))], blocks=1)
    assert found.blocks == 1
    assert found.low is found.high is found.perplexity_low is found.rise_low is None
    assert interval(np.array([2.0]), 0.95) == (2.0, None, None)


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
        assert of["blocks"] == expected["blocks"] == blocks
        for key in ("loss", "rise", "rise_low", "perplexity_high", "gate"):
            assert of[key] == (expected[key] if expected[key] is None else pytest.approx(expected[key], rel=1e-5))


def test_several_patches_of_one_base_are_held_against_the_first(toy: Toy, run: MadeUp) -> None:
    references = [f"{run.directory}@start", f"{run.directory}@commit"]
    found = losses_of(references, [str(toy.shards("first_probe"))])
    (start,), (commit,) = (found[reference] for reference in references)
    (alone,) = probe_losses(references[1], [str(toy.shards("first_probe"))])
    assert start.rise is None
    assert commit.against == references[0]
    assert commit.loss == alone.loss
    assert commit.rise == pytest.approx(commit.loss - start.loss, rel=1e-5)  # the start is the base


def test_diff_measures_both_where_shards_are_named(toy: Toy, run: MadeUp, revpatch: Callable[..., Any]) -> None:
    pair, shards = (f"{run.directory}@start", f"{run.directory}@commit"), ["--shards", toy.shards("first_probe")]
    told = revpatch("ledger", "diff", *pair, *shards, "--blocks", "5", "--json").json()
    expected = losses_of(pair, [str(toy.shards("first_probe"))], blocks=5)
    assert told["losses"].keys() == set(pair) and len(told["layers"]) == 2
    for reference in pair:
        assert [of["loss"] for of in told["losses"][reference]] == [of.loss for of in expected[reference]]
    shown = revpatch("ledger", "diff", *pair, *shards, "--blocks", "5")
    assert shown.code == 0 and "cosine" in shown.out and f"against {pair[0]}" in shown.out


def test_the_command_shows_lines_or_json(toy: Toy, run: MadeUp, revpatch: Callable[..., Any]) -> None:
    shown = revpatch("probe", "--patch", f"{run.directory}@commit", "--shards", toy.shards("first_probe"))
    assert shown.code == 0 and "against the base alone" in shown.out and "perplexity" in shown.out
    twice = ["--shards", toy.shards("first_probe"), "--shards", toy.shards("first_probe")]
    result = revpatch("probe", "--patch", "none", "--base", toy.base, *twice, "--json")
    found = json.loads(result.out)
    assert (found["patch"], found["ranks"]) == ("none", 1)
    assert [of["name"] for of in found["sets"]] == ["first_probe", "first_probe-2"]


def test_what_cannot_be_measured_is_refused(
    toy: Toy, run: MadeUp, tmp_path: Path, revpatch: Callable[..., Any]
) -> None:
    shards = ["--shards", toy.shards("first_probe")]
    other = tmp_path / "other.safetensors"
    base = {**run.metadata["base"], "sha256": "0" * 64}
    write_entry(other, patch_tensors(), {**run.metadata, "base": base})
    wide = tmp_path / "wide.safetensors"
    write_entry(wide, patch_tensors(bottleneck=8), run.metadata)
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"text": "x"}\n')
    for args, words in (
        ([*shards], "--patch none needs --base"),
        (["--base", tmp_path / "nowhere", *shards], "no such local folder"),
        (["--base", toy.base], "--shards is missing"),
        (["--base", toy.base, "--dtype", "float16", *shards], "--dtype float16: choose float32 or bfloat16"),
        (["--base", toy.base, "--shards", tmp_path / "nowhere"], "there is no manifest"),
        (["--base", toy.base, "--shards", mine], "is raw text"),
        (["--patch", run.directory, "--dtype", "float32", *shards], "--dtype is for --patch none"),
        (["--patch", other, *shards], "patch of a base with sha256 0000"),
        (["--patch", wide, *shards], "expected shape"),
        (["--patch", f"{run.directory}@../../etc/passwd", *shards], "is looked at"),
    ):
        patch = [] if "--patch" in args else ["--patch", "none"]
        result = revpatch("probe", *patch, *args)
        assert (result.code, result.out) == (2, ""), result
        assert words in result.err and result.err.count("\n") == 1, result.err
