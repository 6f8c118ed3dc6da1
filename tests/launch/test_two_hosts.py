"""The multi-node launchers across two hosts of one rank each: they end with the commit of a run on one host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Runs
from ssh import Sshd
from two_hosts import TwoHosts
from waiting import until

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
pytestmark = pytest.mark.slow


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    with TwoHosts(tmp_path) as hosts:
        yield hosts


def script(name: str, *arguments: object) -> list[str]:
    return ["bash", str(LAUNCH / name), *map(str, arguments)]


def hostfile(folder: Path) -> Path:
    file = folder / "hostfile"
    file.write_text("# two hosts\nnode0 slots=1\nnode1 slots=1\n", encoding="utf-8")
    return file


def options(runs: Runs, name: str) -> list[str]:
    """Of `train`: the config, and the output folder."""
    return [str(runs.config), "--set", f"output_dir={runs.path(name)}"]


def end(processes: list[subprocess.Popen[bytes]], log: Path, timeout: float = 300) -> list[int]:
    until = time.monotonic() + timeout
    try:
        return [process.wait(max(until - time.monotonic(), 1)) for process in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"did not end within {timeout} s\n{log.read_text()}") from None


def test_torchrun_meets_and_starts_a_dead_rank_again(hosts: TwoHosts, launched: Runs, log: Path) -> None:
    variables = {"NODES": "2", "RDZV": "node0:29400", "RANKS": "1", "RESTARTS": "1"}
    command = script("torchrun_multi_node.sh", *options(launched, "torchrun"))
    # Long enough that a rank can be killed between two snapshots.
    command += ["--set", "phases.0.steps=40"]
    agents = [hosts.start(node, command, log, **variables) for node in (0, 1)]
    first = hosts.rank(1)
    wait_for(launched.path("torchrun") / "snapshot", agents, log)
    os.kill(first, signal.SIGKILL)
    assert end(agents, log) == [0, 0], log.read_text()
    resumed = launched.events("torchrun", "resume")
    assert len(resumed) == 1, log.read_text()
    assert len(launched.commits("torchrun")) == 1


def test_deepspeed_over_ssh(hosts: TwoHosts, launched: Runs, log: Path, tmp_path: Path) -> None:
    run = "ssh&$(true)"  # what the shells on the way must leave alone
    command = script("deepspeed_multi_node.sh", hostfile(tmp_path), *options(launched, run))
    # And one with a space, which deepspeed quotes in its own way.
    shown = 'a `$HOME` \\ "b"'
    samples = [f"monitoring.samples.prompts=[{json.dumps(shown)}]", "monitoring.samples.max_new_tokens=1"]
    command += [word for option in samples for word in ("--set", option)]
    home = tmp_path / "home"
    home.mkdir()
    (home / ".deepspeed_env").write_text("# a comment\n\nSPARE=1\n")
    with Sshd(hosts, tmp_path) as sshd:
        assert end([hosts.start(0, command, log, HOME=str(home), **sshd.variables)], log) == [0], log.read_text()
    assert "node1: " in log.read_text(), "pdsh puts the host before each line"
    assert launched.commits(run) == launched.commits("plain")
    written, _ = launched.events(run, "samples")
    assert written["texts"][0]["prompt"] == shown


def test_deepspeed_without_ssh(hosts: TwoHosts, launched: Runs, log: Path, tmp_path: Path) -> None:
    command = script("deepspeed_multi_node.sh", "--no_ssh", hostfile(tmp_path), *options(launched, "no_ssh"))
    nodes = [hosts.start(node, command, log, NODE_RANK=str(node)) for node in (0, 1)]
    assert end(nodes, log) == [0, 0], log.read_text()
    assert launched.commits("no_ssh") == launched.commits("plain")


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_doctor_looks_at_both_hosts(hosts: TwoHosts, launched: Runs, log: Path, tmp_path: Path, launcher: str) -> None:
    variables = {"NODES": "2", "RDZV": "node0:29400", "RANKS": "1", "COMMAND": "doctor"}
    command = script("torchrun_multi_node.sh", launched.config, "--json")
    if launcher == "deepspeed":
        command = script("deepspeed_multi_node.sh", "--no_ssh", hostfile(tmp_path), launched.config, "--json")
    agents = [hosts.start(node, command, log, NODE_RANK=str(node), **variables) for node in (0, 1)]
    codes = end(agents, log)
    said = log.read_text()
    (line,) = (line for line in said.splitlines() if line.startswith("{"))
    found = json.loads(line)
    assert list(found) == ["node0", "node1"], said
    (launcher,) = (each for each in found["node1"] if each["check"] == "launcher")
    assert launcher["colour"] == "green"
    measured = [each["found"] for findings in found.values() for each in findings if each["check"] == "all-reduce"]
    assert len(measured) == 1 and "between 2 ranks, gloo" in measured[0], said
    red = [each for findings in found.values() for each in findings if each["colour"] == "red"]
    assert codes == ([1, 1] if red else [0, 0])


def wait_for(folder: Path, processes: list[subprocess.Popen[bytes]], log: Path) -> None:
    """Until there is a file in it; fails at once if a process ends before."""

    def there() -> bool:
        assert all(process.poll() is None for process in processes), log.read_text()
        return any(folder.glob("*"))

    until(there, log.read_text, 300)
