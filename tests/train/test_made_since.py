"""An interrupted run whose ledger got a patch that was made: training is refused, and what it advises leads on."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Runs, RunServer
from toy import Toy

from revpatch.ledger.ledger import Ledger, read_patch
from revpatch.ledger.maintenance import verify
from revpatch.patches import load_patched, save_pretrained


@pytest.fixture(scope="module")
def runs(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """ "run" was killed in its second phase, after a snapshot."""
    folder = tmp_path_factory.mktemp("made since")
    runs = Runs(server, toy.config_file(folder, snapshot={"every": 5}, probes={"every": 6}), folder)
    step = {"target": "revpatch.step.engine:AccelerateEngine.train_step", "call": 12 + 8, "when": "after"}
    assert runs.run("run", world=1, kill={"rank": 0, **step}) == [-signal.SIGKILL]
    return runs


def reverted(runs: Runs, run: Path) -> list[Any]:
    return ["revert", run, "first", "--force"]


def saved_and_imported(runs: Runs, run: Path) -> list[Any]:
    """A folder of save_pretrained names no tokenizer."""
    model, _ = load_patched(run)
    save_pretrained(model, run.with_suffix(".saved"))
    return ["import", run.with_suffix(".saved"), run]


@pytest.mark.parametrize("make", [reverted, saved_and_imported])
def test_the_advice_leads_to_a_run_that_is_over(runs: Runs, toy: Toy, make: Callable[[Runs, Path], list[Any]]) -> None:
    old, new = make.__name__, f"after {make.__name__}"
    shutil.copytree(runs.path("run"), runs.path(old))
    log = runs.folder / f"{old}.commands"
    assert runs.server.run("ledger", *make(runs, runs.path(old)), output=log) == [0], log.read_text()
    made = Ledger(runs.path(old) / "ledger", readonly=True).entries()[-1]
    assert runs.run(old, world=1) == [2]
    words = runs.log(old).read_text()
    assert f"would set aside {made.name}" in words
    assert "without the phases that were committed here (first) and their guard_after" in words

    restore, train = re.findall(r"`revpatch (.*?)`", words)
    place = str(runs.path(new))
    command = [place if word == "NEW" else word for word in shlex.split(restore)]
    assert runs.server.run(*command, output=log) == [0], log.read_text()
    settings = toy.settings(runs.folder, snapshot={"every": 5}, probes={"every": 6})
    left = [{**phase, "steps": 4} for phase in settings["phases"] if phase["name"] != "first"]
    sets = [
        {k: v for k, v in each.items() if v != "first"} | {"name": each["name"]} for each in settings["probes"]["sets"]
    ]
    options = ["--set", f"phases={json.dumps(left)}", "--set", f"probes.sets={json.dumps(sets)}"]
    command = [word.replace("=NEW", f"={place}").replace("CONFIG", str(runs.config)) for word in shlex.split(train)]
    assert runs.server.run(*command, *options, output=log) == [0], log.read_text()

    begun = read_patch(f"{place}@start").tensors
    expected = read_patch(f"{runs.path(old)}@{made.name}").tensors
    assert all(torch.equal(begun[name], tensor) for name, tensor in expected.items())
    entries = Ledger(runs.path(new) / "ledger", readonly=True).entries()
    assert [(e.kind, e.phase) for e in entries if e.kind in ("origin", "commit")] == [
        ("origin", made.phase),
        ("commit", "second"),
    ]
    assert verify(runs.path(new)).ok and verify(runs.path(old)).ok
