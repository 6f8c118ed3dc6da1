"""launch/accelerate.yaml on this machine, and what the scripts say when they are called wrongly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from ranks import BIN, Runs, environment, free_port, run

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@pytest.mark.slow
def test_accelerate_starts_the_ranks(launched: Runs) -> None:
    here = ["--num_processes", "2", "--main_process_port", str(free_port())]
    train = ["train", str(launched.config), "--set", f"output_dir={launched.path('accelerate')}"]
    start = [str(BIN / "accelerate"), "launch", "--config_file", str(LAUNCH / "accelerate.yaml"), *here]
    done = run([*start, "--module", "revpatch", *train])
    assert done.returncode == 0, done.stdout
    assert launched.commits("accelerate") == launched.commits("plain")


@pytest.mark.parametrize(
    ("call", "variables", "words"),
    [
        (["torchrun_multi_node.sh", "c.yaml"], {}, "NODES: is not set"),
        (["torchrun_multi_node.sh", "c.yaml"], {"NODES": "2"}, "RDZV: is not set"),
        (["torchrun_multi_node.sh"], {"NODES": "2", "RDZV": "a:1"}, "no config"),
        (["deepspeed_multi_node.sh", "hosts"], {}, "needs a hostfile and a config"),
        (["deepspeed_multi_node.sh", "no/such", "c.yaml"], {}, "hostfile no/such: no such file"),
        (["deepspeed_multi_node.sh", "--no_ssh", "hosts", "c.yaml"], {}, "NODE_RANK: is not set"),
    ],
)
def test_a_wrong_call_is_told(call: list[str], variables: dict[str, str], words: str) -> None:
    command = ["bash", str(LAUNCH / call[0]), *call[1:]]
    done = subprocess.run(command, env={**environment(), **variables}, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("command", "restarts"), [("train", "3"), ("doctor", "0")])
def test_torchrun_starts_again_what_trains_and_nothing_else(tmp_path: Path, command: str, restarts: str) -> None:
    told = words_to("torchrun", "torchrun_multi_node.sh", tmp_path, ["c.yaml"], COMMAND=command, NODES="2", RDZV="a:1")
    assert told[told.index("--max_restarts") + 1] == restarts
    assert told[-3:] == ["revpatch", command, "c.yaml"]


@pytest.mark.parametrize("hosts", [["node0"], ["node0", "node1"]])
def test_deepspeed_gives_the_ranks_the_words_that_were_typed(hosts: list[str], tmp_path: Path) -> None:
    """Of several hosts through a shell, with those that have a space put in double quotes; of one host as they are."""
    told = deepspeed_told(tmp_path, hosts, words := ["c.yaml", "--set", "a=b c `$HOME` \\ $(d)", "--set", "e='f;$(g)'"])
    start = told.index("revpatch")
    assert told[start : start + 2] == ["revpatch", "doctor"]
    assert told[told.index("--master_addr") + 1] == "node0"
    options = told[start + 2 :]
    if len(hosts) > 1:
        typed = " ".join(f'"{option}"' if " " in option else option for option in options)
        shell = ["bash", "-c", f"printf '%s\\0' {typed}"]
        options = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    assert options == words


def deepspeed_told(folder: Path, hosts: list[str], words: list[str]) -> list[str]:
    """What the script calls `deepspeed` with; it looks with doctor."""
    hostfile = folder / "hostfile"
    hostfile.write_text("# hosts\n\n" + "".join(f"{host} slots=1\n" for host in hosts))
    return words_to("deepspeed", "deepspeed_multi_node.sh", folder, [str(hostfile), *words], COMMAND="doctor")


def words_to(launcher: str, script: str, folder: Path, words: list[str], **variables: str) -> list[str]:
    """What the script, in a checkout without a .venv, calls the launcher with, for which there is a stub."""
    stub = folder / "bin" / launcher
    stub.parent.mkdir()
    stub.write_text("#!/usr/bin/env python\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o700)
    (folder / "launch").mkdir()
    copy = shutil.copy(LAUNCH / script, folder / "launch")
    around = {**environment(), **variables, "HOME": str(folder)}
    around["PATH"] = f"{stub.parent}{os.pathsep}{around['PATH']}"
    done = subprocess.run(["bash", str(copy), *words], env=around, capture_output=True, text=True, check=True)
    told: list[str] = json.loads(done.stdout)
    return told
