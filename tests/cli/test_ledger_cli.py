"""The ledger of a real run, from the command line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from command import Call
from trained_run import STEPS, Run, copy_of

from revpatch.config import ConfigError
from revpatch.config.file import load_config
from revpatch.ledger.journal import Journal
from revpatch.train.resume import run_status


def test_the_log_tells_the_run(run: Run, revpatch: Call) -> None:
    result = revpatch("ledger", "log", run.directory)
    assert (result.code, result.err) == (0, "")
    for phase, steps in STEPS.items():
        assert f"{phase}  phase_start" in result.out
        assert f"{phase} step {steps}  commit entry" in result.out
    assert "run_end" in result.out
    assert len(re.findall(r"step \d+  probe", result.out)) == 5


def test_verify_is_content_with_a_whole_ledger_and_not_with_a_flipped_bit(
    run: Run, revpatch: Call, tmp_path: Path
) -> None:
    result = revpatch("ledger", "verify", run.directory)
    assert (result.code, result.err) == (0, "")
    assert "the chain holds" in result.out
    copied = copy_of(run, tmp_path)
    entry = copied / "ledger/000_first_commit.safetensors"
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data)
    result = revpatch("ledger", "verify", copied)
    assert result.code == 1
    assert "000_first_commit.safetensors" in result.out
    assert "sha256" in result.out


def test_the_base_of_a_trained_run_is_that_of_its_start_and_its_end(run: Run, revpatch: Call) -> None:
    told = revpatch("ledger", "verify", run.directory, "--removal", "--json").json()["removal"]
    assert [noted["event"] for noted in told["noted"]] == ["run", "run_end"]
    assert all(noted["same_weights"] for noted in told["noted"]) and told["ok"]
    journal = Journal(run.directory / "ledger/journal.jsonl", readonly=True).records()
    start, end = (event["bare_base"] for event in journal if "bare_base" in event)
    assert start == end


def test_training_on_does_not_set_a_made_patch_aside(run: Run, revpatch: Call, tmp_path: Path) -> None:
    copied = copy_of(run, tmp_path)
    (tmp_path / "alone").mkdir()
    shutil.copy(run.entry("000_first_commit.safetensors"), tmp_path / "alone/patch.safetensors")
    assert revpatch("ledger", "import", tmp_path / "alone/patch.safetensors", copied).code == 0
    before = Journal(copied / "ledger/journal.jsonl", readonly=True).head
    loaded = load_config(run.config, [*run.overrides, f"output_dir={copied}"])
    standing = run_status(loaded, fresh=False, overwrite=False)  # nothing is left to train: nothing is set aside
    standing.lock.close()
    third = loaded.phases[0].model_copy(update={"name": "third"})
    with pytest.raises(
        ConfigError, match=r"would set aside 002_first_commit\.safetensors.*ledger restore \S.*@002_first_commit"
    ):
        run_status(loaded.model_copy(update={"phases": [*loaded.phases, third]}), fresh=False, overwrite=False)
    assert Journal(copied / "ledger/journal.jsonl", readonly=True).head == before
