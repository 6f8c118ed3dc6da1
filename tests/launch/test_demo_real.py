"""launch/demo_real.sh: what it starts and in which order, with stubs for what downloads, trains and writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ranks import environment

SCRIPT = Path(__file__).resolve().parents[2] / "launch/demo_real.sh"
STUB = """#!/bin/bash
case "$*" in
  *device_count*) echo {gpus};;
  *"import gguf"*) exit {without_gguf};;
  *) echo "{name} $*" >>"$TOLD";;
esac
"""


def told(folder: Path, *words: str, gpus: int = 0, gguf: bool = True, **variables: str) -> list[str]:
    """What the script, in a checkout of its own, calls python and deepspeed with."""
    (folder / "launch").mkdir()
    (folder / "bin").mkdir()
    (folder / "launch/demo_real.sh").write_bytes(SCRIPT.read_bytes())
    (folder / "launch/setup.sh").write_text(f"ROOT='{folder}'\nexport PATH='{folder}/bin':\"$PATH\"\n")
    for name in ("python", "deepspeed"):
        stub = folder / "bin" / name
        stub.write_text(STUB.format(name=name, gpus=gpus, without_gguf=int(not gguf)))
        stub.chmod(0o700)
    log = folder / "told"
    done = subprocess.run(
        ["bash", str(folder / "launch/demo_real.sh"), *words],
        env={**environment(), "TOLD": str(log), "MASTER_PORT": "1234", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines()


def test_the_model_is_made_and_trained_and_its_texts_are_shown(tmp_path: Path) -> None:
    out = tmp_path / "runs/demo_real"
    assert told(tmp_path) == [
        "python tools/real_tier.py smollm2",
        "deepspeed --quiet --num_accelerators 2 --master_port 1234 --module revpatch train configs/demo_real.yaml "
        f"--set output_dir='{out}'",
        f"python tools/before_and_after.py {out}",
    ]


@pytest.mark.parametrize(("gpus", "ranks"), [(1, 1), (3, 2), (8, 4)])
def test_gpus_are_used_as_far_as_the_batch_can_be_split(tmp_path: Path, gpus: int, ranks: int) -> None:
    assert f"--num_gpus {ranks} " in told(tmp_path, gpus=gpus)[1]


def test_what_reads_the_package_is_installed_unless_a_hub_has_the_model(tmp_path: Path) -> None:
    for name in ("without", "hub"):
        (tmp_path / name).mkdir()
    lines = told(tmp_path / "without", gguf=False)
    assert "pip install" in lines[0] and lines[0].endswith("gguf==0.19.0")
    lines = told(tmp_path / "hub", "a run", gguf=False, HUB="HuggingFaceTB/SmolLM2-135M")
    assert lines[0] == "python tools/real_tier.py --hub HuggingFaceTB/SmolLM2-135M smollm2"
    assert lines[-1].startswith("python tools/before_and_after.py ") and lines[-1].endswith("/a run")
