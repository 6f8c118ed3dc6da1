"""launch/accelerate.yaml on this machine, and what the scripts say when they are called wrongly."""

from __future__ import annotations

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
