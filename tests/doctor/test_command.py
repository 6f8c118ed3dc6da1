"""`revpatch doctor` as a person and as a script calls it: alone, and on two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command import Call
from ranks import RunServer
from toy import Toy

from revpatch import doctor as examine
from revpatch.cli import main
from revpatch.doctor import Examined, Places, this_machine
from revpatch.doctor.checks import Finding

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
    monkeypatch.setattr(examine, "examine", lambda _: Examined(fine))
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
    (tmp_path / "raw.jsonl").write_text('{"text": "a"}\n')
    config = toy.config(
        tmp_path,
        output_dir=str(tmp_path / "file/run"),
        stream={"shard_cache": None},
        phases=[{"name": "raw", "shards": str(tmp_path / "raw.jsonl"), "steps": 9}],
        probes={"sets": []},
        build={"folder": str(tmp_path / "file/built")},
    )
    findings = {finding.check: finding for finding in this_machine(Places.of(config))}
    assert {findings[name].colour for name in ("output", "built shards")} == {"red"}
    assert "shard cache" not in findings
    named = CHECKS | {"built shards"}
    assert findings.keys() == named - {"shard cache", "launcher", "all-reduce"}


def test_locks_are_looked_for_where_torch_has_its_extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lock = tmp_path / "torch_extensions/py3_cpu/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (found,) = (each for each in this_machine(Places(cache=None)) if each.check == "extension locks")
    assert str(lock) in found.advice
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "elsewhere"))
    (found,) = (each for each in this_machine(Places(cache=None)) if each.check == "extension locks")
    assert found.colour == "green"


SECOND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
"""The variables of a rank on the second of two machines."""


def test_the_machine_that_is_wrong_says_so_itself(revpatch: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECOND, "LOCAL_RANK": "0", "MASTER_PORT": "99999"}.items():
        monkeypatch.setenv(name, value)
    done = revpatch("doctor", "--json")
    ((_, findings),) = json.loads(done.out).items()
    assert done.code == 1
    assert {each["check"] for each in findings} == CHECKS - {"all-reduce"}
    assert "99999 is no port" in next(each["advice"] for each in findings if each["check"] == "launcher")


@pytest.mark.parametrize("error", [RuntimeError("connectFullMesh failed\nat"), ConnectionError("a rank has ended")])
def test_what_was_found_is_not_lost_with_the_other_ranks(
    revpatch: Call, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(examine, "process_group", breaks)
    for name, value in {**SECOND, "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = revpatch("doctor", "--json")
    ((_, findings),) = json.loads(done.out).items()
    assert done.code == 1
    assert {each["check"] for each in findings} == CHECKS
    assert str(error).splitlines()[0] in next(each["found"] for each in findings if each["check"] == "all-reduce")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert revpatch("doctor", "--json").out == "", "one rank of a machine says it"


def test_a_rank_without_a_gpu_says_so(revpatch: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu(_: object) -> None:
        raise ValueError("LOCAL_RANK=1, but this machine shows 1 GPUs")

    monkeypatch.setattr(examine.Launch, "device", no_gpu)
    for name, value in {**SECOND, "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    done = revpatch("doctor", "--json")
    assert (done.code, "this machine shows 1 GPUs" in done.out) == (1, True)


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
