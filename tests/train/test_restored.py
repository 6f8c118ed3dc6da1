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
    phase: dict[str, Any] = {"name": "first", "shards": str(toy.shards("first")), "steps": 6}
    probe = {"name": "base", "shards": str(toy.shards("base_probe")), "tolerance": 0.5, "max_blocks": 16}
    shown = {"every": 1, "samples": {"max_new_tokens": 1}}
    changes = {"snapshot": {"every": 3}, "monitoring": shown, "probes": {"every": 2, "sets": [probe]}}
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
    start, found = (patch := read_patch(f"{new}@start")).tensors, patch.metadata
    assert all(torch.equal(start[name], tensor) for name, tensor in committed.items())
    sizes = committed["00.channels"]
    assert (sizes > 0).all() and not torch.allclose(sizes, torch.ones_like(sizes), atol=0.05), "measured, not assumed"
    assert found["parent"] == read_patch(f"{new}@origin").sha256
    entries = {(e.kind, run): e.sets["base"] for run in (old, new) for e in ledger(run) if e.kind != "origin"}
    assert entries["start", new].loss == pytest.approx(entries["commit", old].loss, abs=1e-6)
    assert entries["start", new].base == pytest.approx(entries["start", old].loss, abs=1e-6), "the unpatched base"
    first, last = re.findall(r"first (?:1|6)/6 .*", (new / "train.log").read_text())
    kl = [float(found[1]) if (found := re.search(r"distill_kl (\S+)", line)) else 0.0 for line in (first, last)]
    assert min(kl) > 1e-4, "the base itself is the teacher on its own text, and the restored patch has left it"
    assert runs.events("through", "run")[0]["origin"] == "000_first_origin.safetensors"
    reports = [report_of(run) for run in (old, new)]
    assert [report.matrix.rows for report in reports] == [["base", "first"], ["000_first_origin.safetensors", "first"]]
    since = [report.measures["base text since the base"] for report in reports]
    assert since[1].value == pytest.approx(entries["start", old].loss - entries["commit", new].loss, abs=1e-6)
    assert [after for after, _ in reports[1].run.samples] == ["000_first_origin.safetensors", "first"]
    assert verify(new).ok


def ledger(run: Path) -> list[Any]:
    return Ledger(run / "ledger", readonly=True).entries()


@pytest.mark.parametrize("call", [2, 5], ids=["before a snapshot", "after one"])
def test_killed_it_is_resumed_to_the_same_commit(runs: Runs, call: int) -> None:
    name = unbegun(runs, f"killed{call}")
    step = {"target": "revpatch.step.engine:AccelerateEngine.train_step", "call": call, "when": "after"}
    assert -signal.SIGKILL in runs.run(name, kill={"rank": 1, **step})
    spared = prune(runs.path(name), keep=1).spared  # in between, as a person might
    assert list(spared) == (["000_first_good_step000000002.safetensors"] if call == 5 else []), "the snapshot's"
    assert runs.run(name) == [0, 0], runs.log(name).read_text()
    assert runs.commits(name) == runs.commits("through")
    assert ledger(runs.path(name))[0].kind == "origin"
    assert verify(runs.path(name)).ok


@pytest.mark.parametrize(
    ("target", "when", "there"),
    [
        ("revpatch.ledger.patch_file:write_atomically", "half", False),
        ("revpatch.ledger.journal:Journal._write", "half", True),
        ("revpatch.durable:_sync_tree", "after", False),
    ],
)
def test_a_restore_that_was_killed_leaves_no_run_and_is_done_again(
    runs: Runs, target: str, when: str, there: bool
) -> None:
    """In a new folder, or in one that is there and empty."""
    folder = runs.folder / target.replace(":", "_")
    folder.mkdir()
    new, log = folder / "new", folder.with_suffix(".log")
    if there:
        new.mkdir()
    args = ("ledger", "restore", runs.path("old"), "--as-new-run", new)
    kill = {"rank": 0, "call": 1, "target": target, "when": when}
    assert runs.server.run(*args, output=log, kill=kill) == [-signal.SIGKILL]
    assert not (new / "ledger").exists() and new.exists() == there
    assert runs.server.run(*args, output=log) == [0], log.read_text()
    assert [path.name for path in folder.iterdir()] == ["new"], "nothing is left beside it"
    assert [path.name for path in new.iterdir()] == ["ledger"], "nor in it"
    assert read_patch(f"{new}@origin").sha256 == read_patch(f"{runs.path('through')}@origin").sha256
    assert verify(new).ok
    assert runs.server.run(*args, output=log) == [2]
    assert "Nothing was overwritten" in log.read_text()


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def test_what_is_refused_and_leaves_it_as_it_was(runs: Runs, toy: Toy) -> None:
    other = save_base(runs.folder / "other", toy.tokenizer, seed=5)
    name = unbegun(runs, "refused")
    before = contents(runs.path(name))
    for options, message in (
        (["--set", "sidecar.bottleneck=4"], "a patch of another shape: it has sidecar.bottleneck = 8, not 4"),
        (["--fresh"], "--fresh would begin without the patch"),
        (["--fresh", "--overwrite"], "--fresh would begin without the patch"),
        (["--set", f"base.model={other}"], "name the base that it was trained on"),
    ):
        assert runs.run(name, *options, world=1) == [2]
        assert message in runs.log(name).read_text()
        assert {path: data for path, data in contents(runs.path(name)).items() if path in before} == before
    file = runs.path(name) / "ledger/000_first_origin.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert runs.run(name, world=1) == [2]
    assert "is not the file that was recorded" in runs.log(name).read_text()
    shutil.copytree(runs.path("old/ledger"), runs.path("alone/ledger"))
    assert runs.run("alone", world=1) == [2], "a ledger that no restore made is somebody else's"
    assert "neither an empty folder nor a run" in runs.log("alone").read_text()


def test_one_that_can_not_be_resumed_is_begun_again_as_its_message_says(runs: Runs) -> None:
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
        advice = re.search(r"`revpatch ledger restore (\S+) --as-new-run NEW`, then train with", words)
        assert advice is not None and "--fresh" not in words, words
    restore_run(advice[1], runs.path("again"))
    assert [e.kind for e in ledger(runs.path("again"))] == ["origin"]
    start, expected = (read_patch(f"{runs.path(run)}@origin").tensors for run in ("again", "through"))
    assert all(torch.equal(start[key], tensor) for key, tensor in expected.items())
