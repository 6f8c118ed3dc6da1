"""The set-up script: a failed install is never taken for a finished one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_failed_install_stops_the_set_up_and_is_tried_again(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "launch/setup.sh", "launch/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-c", "set -euo pipefail; source launch/setup.sh; echo went on"],
            cwd=tmp_path,
            env={**kept, **nowhere, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "pip failed" in done.stderr
        assert "installing into" in done.stdout, "the second try installs again"
        assert "went on" not in done.stdout
