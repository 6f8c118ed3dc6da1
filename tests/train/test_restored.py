"""Runs that begin with a patch of another run: from its very weights, held to it, killed and resumed."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Runs, RunServer
from toy import Toy, save_base

from revpatch.ledger.ledger import Ledger, read_patch
from revpatch.ledger.maintenance import prune, restore_run, verify
from revpatch.report import report_of


@pytest.fixture(scope="module")
def runs(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """ "old" has one phase; "through" was restored from its commit, trained another, and was never killed."""
    folder = tmp_path_factory.mktemp("restored")
    phase: dict[str, Any] = {"name": "first", "shards": str(toy.shards("first")), "steps": 12}
    probe = {"name": "base", "shards": str(toy.shards("base_probe")), "tolerance": 0.5, "max_blocks": 16}
    shown = {"every": 1, "samples": {"max_new_tokens": 1}}
    changes = {"snapshot": {"every": 5}, "monitoring": shown, "probes": {"every": 3, "sets": [probe]}}
    runs = Runs(server, toy.config_file(folder, phases=[phase], **changes), folder)
    assert runs.run("old", world=1) == [0], runs.log("old").read_text()
    restore_run(str(runs.path("old")), runs.path("through"))
    (folder / "unbegun").mkdir()
    shutil.copytree(runs.path("through/ledger"), folder / "unbegun/ledger")
    toy.config_file(folder, phases=[{**phase, "shards": str(toy.shards("second"))}], **changes)
    assert runs.run("through") == [0, 0], runs.log("through").read_text()
    return runs


def unbegun(runs: Runs, name: str) -> str:
    """A copy of the restored run before it was trained."""
    shutil.copytree(runs.path("unbegun"), runs.path(name))
    return name


def test_it_begins_with_the_patch_and_is_held_to_it(runs: Runs) -> None:
    old, new = runs.path("old"), runs.path("through")
    committed = read_patch(old).tensors
    start, told = (patch := read_patch(f"{new}@start")).tensors, patch.metadata
    assert all(torch.equal(start[name], tensor) for name, tensor in committed.items())
    sizes = committed["00.channels"]
    assert (sizes > 0).all() and not torch.allclose(sizes, torch.ones_like(sizes), atol=0.05), "measured, not assumed"
    assert told["parent"] == read_patch(f"{new}@origin").sha256
    entries = {(e.kind, run): e.sets["base"] for run in (old, new) for e in ledger(run) if e.kind != "origin"}
    assert entries["start", new].loss == pytest.approx(entries["commit", old].loss, abs=1e-6)
    assert entries["start", new].base == pytest.approx(entries["start", old].loss, abs=1e-6), "the unpatched base"
    first, last = re.findall(r"first (?:1|12)/12 .*", (new / "train.log").read_text())
    kl = [float(found[1]) if (found := re.search(r"distill_kl (\S+)", line)) else 0.0 for line in (first, last)]
    assert min(kl) > 1e-4, "the base itself is the teacher on its own text, and the restored patch has left it"
    assert runs.events("through", "run")[0]["origin"] == "000_first_origin.safetensors"
    told = [report_of(run) for run in (old, new)]
    assert [report.matrix.rows for report in told] == [["base", "first"], ["000_first_origin.safetensors", "first"]]
    since = [report.measures["base text since the base"] for report in told]
    assert since[1].value == pytest.approx(entries["start", old].loss - entries["commit", new].loss, abs=1e-6)
    assert [after for after, _ in told[1].run.samples] == ["000_first_origin.safetensors", "first"]
    assert verify(new).ok


def ledger(run: Path) -> list[Any]:
    return Ledger(run / "ledger", readonly=True).entries()


@pytest.mark.parametrize("call", [3, 8], ids=["before a snapshot", "after one"])
def test_killed_it_goes_on_to_the_same_commit(runs: Runs, call: int) -> None:
    name = unbegun(runs, f"killed{call}")
    step = {"target": "revpatch.step.engine:AccelerateEngine.train_step", "call": call, "when": "after"}
    assert -signal.SIGKILL in runs.run(name, kill={"rank": 1, **step})
    spared = prune(runs.path(name), keep=1).spared  # in between, as a person might
    assert list(spared) == (["000_first_good_step000000003.safetensors"] if call == 8 else []), "the snapshot's"
    assert runs.run(name) == [0, 0], runs.log(name).read_text()
    assert runs.commits(name) == runs.commits("through")
    assert ledger(runs.path(name))[0].kind == "origin"
    assert verify(runs.path(name)).ok


MOMENTS: dict[str, dict[str, Any]] = {
    "the entry, half": {"target": "revpatch.ledger.patch_file:write_atomically", "when": "half"},
    "the entry without its line": {"target": "revpatch.ledger.ledger:write_entry", "when": "after"},
    "the line, half": {"target": "revpatch.ledger.journal:Journal._write", "when": "half"},
    "before it has its name": {"target": "revpatch.durable:_sync_tree", "when": "after"},
}


@pytest.mark.parametrize("there", [False, True], ids=["new", "an empty folder"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_restore_that_was_killed_leaves_no_run_and_is_done_again(runs: Runs, moment: str, there: bool) -> None:
    folder = runs.folder / f"{moment} {there}"
    folder.mkdir()
    new, log = folder / "new", folder.with_suffix(".log")
    if there:
        new.mkdir()
    args = ("ledger", "restore", runs.path("old"), "--as-new-run", new)
    kill = {"rank": 0, "call": 1, **MOMENTS[moment]}
    assert runs.server.run(*args, output=log, kill=kill) == [-signal.SIGKILL]
    assert not (new / "ledger").exists() and new.exists() == there
    assert runs.server.run(*args, output=log) == [0], log.read_text()
    assert [path.name for path in folder.iterdir()] == ["new"], "nothing is left beside it"
    assert [path.name for path in new.iterdir()] == ["ledger"], "nor in it"
    assert read_patch(f"{new}@origin").sha256 == read_patch(f"{runs.path('through')}@origin").sha256
    assert verify(new).ok


def test_a_restore_that_was_killed_at_its_very_end_is_whole(runs: Runs) -> None:
    new, log = runs.path("restored"), runs.log("restored")
    args = ("ledger", "restore", runs.path("old"), "--as-new-run", new)
    kill = {"rank": 0, "target": "pathlib:Path.rename", "call": 1, "when": "after"}
    assert runs.server.run(*args, output=log, kill=kill) == [-signal.SIGKILL]
    assert verify(new).ok and [path.name for path in new.iterdir()] == ["ledger"]
    assert runs.server.run(*args, output=log) == [2]
    assert "Nothing was overwritten" in log.read_text()


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def test_what_is_refused_and_leaves_it_as_it_was(runs: Runs, toy: Toy, tmp_path: Path) -> None:
    name = unbegun(runs, "refused")
    before = contents(runs.path(name))
    for options, message in (
        (["--set", "sidecar.bottleneck=4"], "a patch of another shape: it has sidecar.bottleneck = 8, not 4"),
        (["--fresh"], "--fresh would begin without the patch"),
        (["--fresh", "--overwrite"], "--fresh would begin without the patch"),
    ):
        assert runs.run(name, *options, world=1) == [2]
        assert message in runs.log(name).read_text()
        assert contents(runs.path(name)) == before
    other = save_base(tmp_path / "other", toy.tokenizer, seed=5)
    assert runs.run(name, "--set", f"base.model={other}", world=1) == [2]
    assert "name the base that it was trained on" in runs.log(name).read_text()
    assert {path: data for path, data in contents(runs.path(name)).items() if path in before} == before
    assert runs.run(name, world=1) == [0], runs.log(name).read_text()


def test_a_tampered_origin_is_not_trained_on(runs: Runs) -> None:
    name = unbegun(runs, "tampered")
    file = runs.path(name) / "ledger/000_first_origin.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert runs.run(name, world=1) == [2]
    assert "is not the file that was recorded" in runs.log(name).read_text()
    assert not (runs.path(name) / "config.yaml").exists()


def test_a_ledger_alone_that_is_no_restored_runs_is_somebody_elses(runs: Runs) -> None:
    shutil.copytree(runs.path("old/ledger"), runs.path("bare/ledger"))
    before = contents(runs.path("bare"))
    assert runs.run("bare", world=1) == [2]
    assert "neither an empty folder nor a run" in runs.log("bare").read_text()
    assert contents(runs.path("bare")) == before


def test_one_that_can_not_go_on_is_begun_again_as_it_is_told(runs: Runs) -> None:
    """--fresh is refused to it, so that is no advice."""
    name = "lost"
    shutil.copytree(runs.path("through"), runs.path(name))
    assert runs.run(name, "--fresh", world=1) == [2]
    assert "was made by `revpatch ledger restore`" in runs.log(name).read_text(), "not: add --overwrite"
    for harm in (lambda path: path.write_bytes(path.read_bytes()[:-100]), Path.unlink):
        for path in (runs.path(name) / "snapshot").iterdir():
            harm(path)
        assert runs.run(name, world=1) == [2]
        words = " ".join(runs.log(name).read_text().split())
        told = re.search(r"`revpatch ledger restore (\S+) --as-new-run NEW`, then train with", words)
        assert told is not None and "--fresh" not in words, words
    restore_run(told[1], runs.path("again"))
    assert runs.run("again", world=1) == [0], runs.log("again").read_text()
    start, expected = (read_patch(f"{runs.path(run)}@start").tensors for run in ("again", "through"))
    assert all(torch.equal(start[key], tensor) for key, tensor in expected.items())
