"""`revpatch doctor` as a person and as a script calls it: alone, and on two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from ranks import RunServer
from toy import Toy

from revpatch.cli import main
from revpatch.doctor import examine
from revpatch.doctor.examine import Places, this_machine
from revpatch.doctor.finding import Finding

CHECKS = {
    *("launcher", "versions", "GPUs", "GPU links", "bfloat16", "shared memory", "output", "shard cache", "hub cache"),
    *("extension locks", "open files", "all-reduce"),
}


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["revpatch", "doctor", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_launcher")
def test_a_red_finding_is_shown_first_and_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fine = {"host": [Finding("GPUs", "green", "8"), Finding("open files", "yellow", "few", "more")]}
    monkeypatch.setattr(examine, "examine", lambda _: fine)
    assert call(monkeypatch) == 0
    fine["host"].append(Finding("output", "red", "full [bold]", "make room"))
    capfd.readouterr()
    assert call(monkeypatch) == 1
    shown = capfd.readouterr().out
    assert shown.index("full [bold]") < shown.index("few") < shown.index("GPUs")
    assert call(monkeypatch, "--json") == 1
    assert [each["colour"] for each in json.loads(capfd.readouterr().out)["host"]] == ["green", "yellow", "red"]


@pytest.mark.usefixtures("no_launcher")
def test_what_a_config_names_is_looked_at(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = toy.config(tmp_path, output_dir=str(tmp_path / "file/run"), stream={"shard_cache": None})
    findings = {finding.check: finding for finding in this_machine(Places.of(config))}
    assert findings["output"].colour == "red"
    assert "shard cache" not in findings
    assert findings.keys() == CHECKS - {"shard cache", "launcher", "all-reduce"}


def test_two_ranks_are_looked_at_together(server: RunServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert server.run("doctor", "--json", output=out, world=2) == [0, 0], out.read_text()
    said = out.read_text()
    ((_, findings),) = json.loads(said[said.index("{") :]).items()
    assert {finding["check"] for finding in findings} == CHECKS
    measured = next(finding for finding in findings if finding["check"] == "all-reduce")
    assert "between 2 ranks, gloo" in measured["found"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_launcher")
def test_alone_it_starts_two_ranks_to_measure(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--json") == 0
    ((_, findings),) = json.loads(capfd.readouterr().out).items()
    assert {finding["check"] for finding in findings} == CHECKS
