"""A phase taken out of the newest patch: what is made, when it is written, and what is refused."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import MadeUp, Tensors, patch_tensors, plus, taught
from toy import Toy

from revpatch.evaluation.losses import probe_losses
from revpatch.ledger.journal import Journal
from revpatch.ledger.maintenance import verify
from revpatch.surgery.combine import revert
from revpatch.surgery.exchange import import_patch

Make = Callable[..., MadeUp]


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="session")
def states(toy: Toy) -> dict[str, Tensors]:
    start = patch_tensors(strength=0)
    harmed = taught(toy, "base", worse=True, layer=1, start=start)
    return {"start": start, "harmed": harmed, "learned": taught(toy, "second", start=harmed)}


@pytest.fixture
def run(make_run: Make, states: dict[str, Tensors]) -> MadeUp:
    """The first phase did harm, and the second learned on."""
    run = make_run()
    run.phase("first", states["start"], states["harmed"])
    run.phase("second", states["harmed"], states["learned"])
    return run


def test_a_harmful_phase_is_taken_out_and_the_entry_says_how(run: MadeUp, states: dict[str, Tensors]) -> None:
    before = {entry.name: entry.sha256 for entry in run.ledger.entries()}
    made = revert(run.directory, "first")
    assert made.agrees and made.name == "002_revert-first_commit.safetensors"
    tensors, metadata = (patch := run.ledger.read(made.name)).tensors, patch.metadata
    for name, tensor in tensors.items():
        expected = states["learned"][name] - (states["harmed"][name] - states["start"][name])
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
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
    assert newest is not None and newest.name == made.name
    assert newest.made_by == metadata["made_by"]
    assert newest.sets == made.sets
    assert {entry.name: entry.sha256 for entry in run.ledger.entries()} == {**before, made.name: made.sha256}
    assert verify(run.directory).ok


def test_the_probes_are_those_of_the_two_patches(toy: Toy, run: MadeUp) -> None:
    made = revert(run.directory, "first")
    assert made.sets.keys() == {"base", "first", "second"}
    for reference, key in ((f"{run.directory}@commit~1", "reference"), (f"{run.directory}@commit", "loss")):
        (found,) = probe_losses(reference, [str(toy.shards("base_probe"))], blocks=16)
        assert getattr(made.sets["base"], key) == pytest.approx(found.loss, rel=1e-6)
    assert made.sets["base"].guarded and made.sets["second"].guarded
    assert not made.sets["first"].guarded, "what the phase taught is what is given up"


def test_taking_out_the_newest_phase_gives_the_state_before_it(run: MadeUp, states: dict[str, Tensors]) -> None:
    made = revert(run.directory, "second", force=True)
    assert made.name is not None
    assert equal(run.ledger.read(made.name).tensors, states["harmed"])


def test_the_guard_refuses_what_makes_a_probe_worse_and_force_does_it(run: MadeUp) -> None:
    events = len(run.ledger.journal.records())
    made = revert(run.directory, "second")  # which had mended the base's loss too
    assert not made.agrees and made.name is None
    assert made.reason.startswith("base rose by") and "the last good entry" not in made.reason
    assert len(run.ledger.journal.records()) == events
    forced = revert(run.directory, "second", force=True)
    assert forced.name is not None and not forced.agrees
    assert run.ledger.read(forced.name).metadata["made_by"]["forced"] == made.reason


def test_sidecars_are_bypassed_by_layer(run: MadeUp, states: dict[str, Tensors]) -> None:
    made = revert(run.directory, "first", layers=[1], force=True)
    assert made.name is not None
    tensors, metadata = (patch := run.ledger.read(made.name)).tensors, patch.metadata
    assert metadata["made_by"]["method"] == "bypass" and metadata["made_by"]["layers"] == [1]
    changed = {name for name in tensors if not torch.equal(tensors[name], states["learned"][name])}
    assert changed == {f"01.coupling.{mlp}.up.{part}" for mlp in "fg" for part in ("weight", "bias")}


def test_shards_on_the_command_line_take_the_place_of_the_config(toy: Toy, run: MadeUp) -> None:
    shutil.move(run.directory / "config.yaml", run.directory / "elsewhere.yaml")
    with pytest.raises(ValueError, match=r"no .*config\.yaml.*--shards"):
        revert(run.directory, "first")
    made = revert(run.directory, "first", shards=[str(toy.shards("base_probe"))])
    assert made.sets.keys() == {"base_probe"} and made.sets["base_probe"].guarded
    assert made.name == "002_revert-first_commit.safetensors"


def test_a_phase_is_not_taken_out_twice(run: MadeUp) -> None:
    revert(run.directory, "first")
    with pytest.raises(
        ValueError,
        match=r"000_first_commit\.safetensors was taken out already, by 002_revert-first_commit\.safetensors",
    ):
        revert(run.directory, "first")
    again = revert(run.directory, "first", force=True)
    assert again.name == "003_revert-first_commit.safetensors"


def test_a_revert_that_was_killed_before_its_line_does_not_stand_in_the_way(
    toy: Toy, run: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:

        def gone(self: Journal, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        killed.setattr(Journal, "append", gone)
        with pytest.raises(KeyboardInterrupt):
            revert(run.directory, "first")
    assert (run.directory / "ledger/002_revert-first_commit.safetensors").is_file()
    made = revert(run.directory, "first", shards=[str(toy.shards("base_probe"))])  # other content under the same name
    assert made.name == "002_revert-first_commit.safetensors"
    assert (run.directory / "ledger/002_revert-first_commit.safetensors.orphan").is_file()
    assert verify(run.directory).ok


def test_what_was_imported_is_not_taken_for_what_was_trained(run: MadeUp, states: dict[str, Tensors]) -> None:
    trained = run.ledger.entries()[1]
    import_patch(run.directory / "ledger/000_first_commit.safetensors", run.directory)
    made = revert(run.directory, "first", force=True)
    assert made.made_by["commit"] == trained.sha256 and made.made_by["before"] == run.ledger.entries()[0].sha256
    assert made.name is not None and equal(run.ledger.read(made.name).tensors, states["start"])
    shutil.rmtree(run.directory / "ledger")
    run.phases.clear()
    run.phase("second", states["start"], states["harmed"])
    run.ledger.record("commit", 1, "first", 0, states["learned"], run.metadata, made_by={"operation": "import"})
    with pytest.raises(ValueError, match=r"001_first_commit\.safetensors was imported .*--layers"):
        revert(run.directory, "first")


def test_what_is_not_known_is_refused_by_name(
    toy: Toy, run: MadeUp, make_run: Make, tmp_path: Path, revpatch: Callable[..., Any]
) -> None:
    alone = make_run("alone")
    alone.ledger.record("commit", 0, "first", 1, patch_tensors(), alone.metadata)
    locked = make_run("locked")
    locked.phase("first", patch_tensors(), plus(patch_tensors(), 1e-3, 0))
    for args, words in (
        ((run.directory, "third"), "no commit of a phase 'third'; committed are first, second"),
        ((run.directory, "../first"), "no commit of a phase '../first'"),
        ((run.directory, "first", "--layers", "0,9"), "no sidecar after block 9"),
        ((run.directory, "first", "--layers", "a"), "--layers a: expected numbers"),
        ((tmp_path / "none", "first", "--shards", toy.shards("base_probe")), "expected the folder of a run"),
        ((alone.directory, "first"), "bypass sidecars instead (--layers)"),
        ((locked.directory, "first"), "another process"),
    ):
        with (locked.directory / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            result = revpatch("ledger", "revert", *args)
        assert (result.code, result.out) == (2, ""), result
        assert words in result.err and result.err.count("\n") == 1, result.err
    assert not (tmp_path / "none").exists()


def test_the_command_exits_with_1_when_nothing_was_written(run: MadeUp, revpatch: Callable[..., Any]) -> None:
    refused = revpatch("ledger", "revert", run.directory, "second")
    assert refused.code == 1
    assert "the guard does not agree: base rose by" in refused.out and "nothing was written" in refused.out
    done = revpatch("ledger", "revert", run.directory, "first", "--json")
    assert done.code == 0 and json.loads(done.out)["name"] == "002_revert-first_commit.safetensors"
