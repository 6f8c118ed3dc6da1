"""Patches reverted, merged and bypassed: exact where they can be, and written only if the guard agrees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import MadeUp, Tensors, equal, patch_tensors, plus, taught
from toy import Toy

from revpatch.config import SidecarConfig
from revpatch.evaluation.losses import probe_losses
from revpatch.ledger.journal import Journal
from revpatch.ledger.ledger import Ledger, read_patch
from revpatch.ledger.maintenance import verify
from revpatch.patch.patched_model import Patch, load_tensors
from revpatch.surgery.combine import bypassed, merge, revert, taken_out, weighted
from revpatch.surgery.exchange import import_patch

Make = Callable[..., MadeUp]


def test_taking_a_phase_out_is_exact_and_keeps_what_later_ones_changed() -> None:
    before, after = patch_tensors(1), patch_tensors(2, strength=30.0)
    assert equal(taken_out(after, after, before), before)
    newest = plus(after, 0.1, seed=3)
    for name, tensor in taken_out(newest, after, before).items():
        torch.testing.assert_close(tensor - before[name], newest[name] - after[name], rtol=0, atol=1e-5)
        assert tensor.dtype == torch.float32


def test_weights_are_taken_as_they_are() -> None:
    a, b = patch_tensors(1), patch_tensors(2)
    assert equal(weighted([a, b], [1.0, 0.0]), a)
    assert equal(weighted([a, a], [0.5, 0.5]), a)
    for name, tensor in weighted([a, b], [1.0, 1.0]).items():
        torch.testing.assert_close(tensor, a[name] if name.endswith("channels") else a[name] + b[name])


@pytest.mark.parametrize("placement", ["residual", "coupled"])
def test_a_bypassed_sidecar_is_the_identity_to_the_bit_and_the_others_are_as_they_were(placement: str) -> None:
    tensors = patch_tensors(strength=1.0, placement=placement)
    patch = Patch(32, 2, SidecarConfig.model_validate({"bottleneck": 4, "placement": placement}))
    load_tensors(patch, bypassed(tensors, [1]))
    u = torch.randn(2, 5, 32)
    first, second = (patch.sidecar(layer) for layer in (0, 1))
    assert first is not None and second is not None
    assert torch.equal(second(u).hidden, u) and not torch.equal(first(u).hidden, u)
    assert all(torch.equal(t, tensors[name]) for name, t in bypassed(tensors, [1]).items() if name.startswith("00."))


@pytest.fixture(scope="session")
def states(toy: Toy) -> dict[str, Tensors]:
    start = patch_tensors(strength=0)
    harmed = taught(toy, "base", worse=True, layer=1, start=start)
    first = taught(toy, "first", start=start)
    merged = {"a": first, "b": taught(toy, "second", start=first)}
    return {"start": start, "harmed": harmed, "learned": taught(toy, "second", start=harmed), **merged}


@pytest.fixture
def run(make_run: Make, states: dict[str, Tensors]) -> MadeUp:
    """The first phase did harm, and the second learned more."""
    run = make_run()
    run.phase("first", states["start"], states["harmed"])
    run.phase("second", states["harmed"], states["learned"])
    return run


@pytest.fixture
def pair(make_run: Make, states: dict[str, Tensors]) -> tuple[str, str]:
    """Two runs that have learned from a common start."""
    runs = [make_run(name) for name in ("a", "b")]
    for run in runs:
        run.phase("first", states["start"], states[run.directory.name])
    return str(runs[0].directory), str(runs[1].directory)


def test_a_harmful_phase_is_taken_out_and_the_entry_says_how(
    toy: Toy, run: MadeUp, states: dict[str, Tensors], revpatch: Callable[..., Any]
) -> None:
    before = {entry.name: entry.sha256 for entry in run.ledger.entries()}
    result = revpatch("ledger", "revert", run.directory, "first", "--json")
    name = "002_revert-first_commit.safetensors"
    assert result.code == 0 and json.loads(result.out)["name"] == name
    tensors, metadata = (patch := run.ledger.read(name)).tensors, patch.metadata
    assert equal(tensors, taken_out(states["learned"], states["harmed"], states["start"]))
    assert metadata["parent"] == before["001_second_commit.safetensors"]
    assert metadata["made_by"] == {
        "operation": "revert",
        "phase": "first",
        "newest": before["001_second_commit.safetensors"],
        "method": "difference",
        "commit": before["000_first_commit.safetensors"],
        "before": before["000_first_start.safetensors"],
    }
    assert {key: metadata[key] for key in run.metadata} == run.metadata
    newest = run.ledger.newest("commit")
    assert newest is not None and newest.name == name and newest.made_by == metadata["made_by"]
    sets = newest.sets
    assert sets is not None and sets.keys() == {"base", "first", "second"}
    for reference, key in ((f"{run.directory}@commit~1", "reference"), (f"{run.directory}@commit", "loss")):
        (found,) = probe_losses(reference, [str(toy.shards("base_probe"))], blocks=16)
        assert getattr(sets["base"], key) == pytest.approx(found.loss, rel=1e-6)
    assert sets["base"].guarded and sets["second"].guarded
    assert not sets["first"].guarded, "the corpus of the phase is what is given up"
    assert {entry.name: entry.sha256 for entry in run.ledger.entries()} == {**before, name: newest.sha256}
    with pytest.raises(ValueError, match=rf"000_first_commit\.safetensors was taken out already, by {name}"):
        revert(run.directory, "first")
    assert revert(run.directory, "first", force=True).name == "003_revert-first_commit.safetensors"
    assert verify(run.directory).ok


def test_the_guard_refuses_what_makes_a_probe_worse_and_force_does_it(
    run: MadeUp, states: dict[str, Tensors], revpatch: Callable[..., Any]
) -> None:
    events = len(run.ledger.journal.records())
    refused = revpatch("ledger", "revert", run.directory, "second")  # which had mended the base's loss too
    assert refused.code == 1 and "nothing was written" in refused.out
    assert "the guard does not agree: base rose by" in refused.out and "the last good entry" not in refused.out
    assert len(run.ledger.journal.records()) == events
    forced = revert(run.directory, "second", force=True)
    assert forced.name is not None and not forced.agrees
    written = run.ledger.read(forced.name)
    assert written.metadata["made_by"]["forced"] == forced.reason
    assert equal(written.tensors, states["harmed"]), "the state before the newest phase"


def test_sidecars_are_bypassed_by_layer_on_shards_named_instead_of_the_config(
    toy: Toy, run: MadeUp, states: dict[str, Tensors]
) -> None:
    shutil.move(run.directory / "config.yaml", run.directory / "elsewhere.yaml")
    made = revert(run.directory, "first", layers=[1], shards=[str(toy.shards("base_probe"))], force=True)
    assert made.sets.keys() == {"base_probe"} and made.sets["base_probe"].guarded
    assert made.name is not None
    tensors = run.ledger.read(made.name).tensors
    assert made.made_by["method"] == "bypass" and made.made_by["layers"] == [1]
    changed = {name for name in tensors if not torch.equal(tensors[name], states["learned"][name])}
    assert changed == {f"01.coupling.{mlp}.up.{part}" for mlp in "fg" for part in ("weight", "bias")}


def test_a_revert_that_was_killed_before_its_line_does_not_stand_in_the_way(
    toy: Toy, run: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Journal, "append", gone)
        with pytest.raises(KeyboardInterrupt):
            revert(run.directory, "first")
    assert (run.directory / "ledger/002_revert-first_commit.safetensors").is_file()
    made = revert(run.directory, "first", shards=[str(toy.shards("base_probe"))])  # other content under the same name
    assert made.name == "002_revert-first_commit.safetensors"
    assert (run.directory / "ledger/002_revert-first_commit.safetensors.orphan").is_file()
    assert verify(run.directory).ok


def test_an_imported_commit_does_not_stand_for_what_was_trained(run: MadeUp, states: dict[str, Tensors]) -> None:
    trained = run.ledger.entries()[1]
    import_patch(run.directory / "ledger/000_first_commit.safetensors", run.directory)
    made = revert(run.directory, "first", force=True)
    assert made.made_by["commit"] == trained.sha256
    assert made.name is not None and equal(run.ledger.read(made.name).tensors, states["start"])


def test_a_mean_is_written_into_a_new_folder_or_as_a_runs_newest_commit(
    pair: tuple[str, str], states: dict[str, Tensors], tmp_path: Path, revpatch: Callable[..., Any]
) -> None:
    made = merge(pair, (0.25, 0.75), tmp_path / "merged")
    assert made.agrees and made.name == "000_merge_commit.safetensors"
    tensors, metadata = (patch := read_patch(tmp_path / "merged")).tensors, patch.metadata
    assert equal(tensors, weighted([states["a"], states["b"]], [0.25, 0.75]))
    assert metadata["made_by"]["weights"] == [0.25, 0.75]
    assert metadata["made_by"]["parents"] == [read_patch(reference).sha256 for reference in pair]
    assert verify(tmp_path / "merged").ok
    assert all(found.guarded for found in made.sets.values())
    result = revpatch("ledger", "merge", pair[0], f"{pair[1]}@commit", "--out", pair[1], "--json")
    assert result.code == 0 and json.loads(result.out)["name"] == "002_merge_commit.safetensors"  # after two phases
    assert verify(Path(pair[1])).ok


def test_a_merge_that_is_worse_than_both_parents_is_refused_unless_forced(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    """At small weights little is left of what both have learned."""
    refused = merge(pair, (0.01, 0.01), tmp_path / "little")
    assert not refused.agrees and refused.name is None and "rose by" in refused.reason
    assert not (tmp_path / "little").exists()
    forced = merge(pair, (0.01, 0.01), tmp_path / "little", force=True)
    assert forced.name is not None
    assert Ledger(tmp_path / "little/ledger").read(forced.name).metadata["made_by"]["forced"] == refused.reason
    one, other = (merge(pair, weights, tmp_path / f"{weights}", force=True) for weights in ((1.0, 0.0), (0.0, 1.0)))
    for name, found in forced.sets.items():
        assert found.reference == max(one.sets[name].loss, other.sets[name].loss)
