"""Two patches of one base made one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import MadeUp, Tensors, patch_tensors, plus, taught
from toy import Toy

from revpatch.ledger.ledger import Ledger, read_patch
from revpatch.ledger.maintenance import verify
from revpatch.surgery.combine import merge

Make = Callable[..., MadeUp]


@pytest.fixture(scope="session")
def learned(toy: Toy) -> tuple[Tensors, Tensors]:
    start = patch_tensors(strength=0)
    first = taught(toy, "first", start=start)
    return first, taught(toy, "second", start=first)


@pytest.fixture
def runs(make_run: Make, learned: tuple[Tensors, Tensors]) -> list[MadeUp]:
    start = patch_tensors(strength=0)
    runs = [make_run(name) for name in ("a", "b")]
    for run, tensors in zip(runs, learned, strict=True):
        run.phase("first", start, tensors)
    return runs


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.25, 0.75)])
def test_a_mean_is_written_into_a_new_folder(
    runs: list[MadeUp], learned: tuple[Tensors, Tensors], tmp_path: Path, weights: tuple[float, float]
) -> None:
    a, b = (str(run.directory) for run in runs)
    made = merge((a, b), weights, tmp_path / "merged")
    assert made.agrees and made.name == "000_merge_commit.safetensors"
    tensors, metadata = (patch := read_patch(tmp_path / "merged")).tensors, patch.metadata
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, weights[0] * learned[0][name] + weights[1] * learned[1][name])
    assert metadata["made_by"]["weights"] == list(weights)
    commits = [run.ledger.newest("commit") for run in runs]
    assert metadata["made_by"]["parents"] == [entry.sha256 for entry in commits if entry is not None]
    assert verify(tmp_path / "merged").ok
    for found in made.sets.values():
        assert found.guarded


def test_each_set_is_held_against_the_worse_parent(runs: list[MadeUp], tmp_path: Path) -> None:
    a, b = (str(run.directory) for run in runs)
    one, other = (merge((a, b), weights, tmp_path / f"{weights}", force=True) for weights in ((1.0, 0.0), (0.0, 1.0)))
    both = merge((b, a), (0.5, 0.5), tmp_path / "both", force=True)
    for name, found in both.sets.items():
        assert found.reference == max(one.sets[name].loss, other.sets[name].loss)


def test_what_is_worse_than_both_is_refused_unless_forced(runs: list[MadeUp], tmp_path: Path) -> None:
    """At small weights little is left of what both have learned."""
    pair = (str(runs[0].directory), str(runs[1].directory))
    refused = merge(pair, (0.01, 0.01), tmp_path / "little")
    assert not refused.agrees and refused.name is None and "rose by" in refused.reason
    assert not (tmp_path / "little").exists()
    forced = merge(pair, (0.01, 0.01), tmp_path / "little", force=True)
    assert forced.name is not None
    assert Ledger(tmp_path / "little/ledger").read(forced.name).metadata["made_by"]["forced"] == refused.reason


def test_a_run_gets_a_new_commit(runs: list[MadeUp], revpatch: Callable[..., Any]) -> None:
    a, b = runs
    result = revpatch("ledger", "merge", a.directory, f"{b.directory}@commit", "--out", b.directory, "--json")
    found = json.loads(result.out)
    assert (result.code, found["name"]) == (0, "002_merge_commit.safetensors")  # the config has two phases
    newest = b.ledger.newest()
    assert newest is not None and newest.sha256 == found["sha256"]
    assert verify(b.directory).ok


def test_patches_that_do_not_go_together_are_refused_by_name(
    runs: list[MadeUp], make_run: Make, toy: Toy, tmp_path: Path, revpatch: Callable[..., Any]
) -> None:
    plain, metadata = patch_tensors(), runs[0].metadata
    base, sidecar = metadata["base"], metadata["sidecar"]
    others = {
        "sha": (plain, {"base": {**base, "sha256": "1" * 64}}),
        "gate": (patch_tensors(gate="token"), {"sidecar": {**sidecar, "gate": "token"}}),
        "shape": (patch_tensors(depth=3), {}),
    }
    for name, (tensors, changed) in others.items():
        make_run(name, config=False).phase("first", tensors, plus(tensors, 1e-3, 0), **changed)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").touch()
    a = runs[0].directory
    for args, words in (
        ((a, tmp_path / "sha", "--out", tmp_path / "x"), "are patches of two bases"),
        ((a, tmp_path / "gate", "--out", tmp_path / "x"), "sidecar.gate = prefix and token"),
        ((a, tmp_path / "shape", "--out", tmp_path / "x"), "are of two shapes: 02."),
        ((a, a, "--out", tmp_path / "sha"), "Only patches of one base go together"),
        ((a, a, "--out", tmp_path / "taken"), "Nothing was overwritten"),
        ((a, a, "--weights", "1", "--out", tmp_path / "x"), "expected two numbers"),
        ((a, a, "--weights", "nan,1", "--out", tmp_path / "x"), "two finite numbers"),
        ((a, a, "--weights", "0,0", "--out", tmp_path / "x"), "not both 0"),
        ((tmp_path / "shape", tmp_path / "shape", "--out", tmp_path / "x"), "name held-out shards with --shards"),
    ):
        result = revpatch("ledger", "merge", *args)
        assert (result.code, result.out) == (2, ""), result
        assert words in result.err and result.err.count("\n") == 1, result.err
    assert not (tmp_path / "x").exists()
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]
