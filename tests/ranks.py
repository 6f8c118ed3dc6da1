"""Starts real ranks for tests: torchrun around rank_checks.py, or any launcher around the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECKS = Path(__file__).parent / "training/rank_checks.py"
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(ranks: int) -> list[str]:
    return [str(BIN / "torchrun"), f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]


def environment() -> dict[str, str]:
    """One thread a rank and no hub; nothing of a launcher around the tests."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    path = f"{BIN}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}


def run(command: list[str], timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Runs a launcher to its end; if it does not end, kills it and all that it started, and fails."""
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"did not end within {timeout} s: {' '.join(command)}\n{output}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)


def rank_check(name: str, config: Path, *overrides: str, ranks: int = 2) -> dict[str, Any]:
    """What a check of rank_checks.py found."""
    out = config.with_name(f"{name}.json")
    done = run([*torchrun(ranks), str(CHECKS), name, str(config), str(out), *overrides])
    assert done.returncode == 0, done.stdout
    found: dict[str, Any] = json.loads(out.read_text())
    return found
