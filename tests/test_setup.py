"""The set-up script: a failed install is never taken for a finished one."""

from __future__ import annotations

import os
import re
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


FAKE_PYTHON = """#!/bin/sh
case "$*" in
*_base_executable*) echo "$0" ;;
*cuda.is_available*) exit 1 ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip "*) ;;
*) exec {python} "$@" ;;
esac
"""


def test_a_torch_that_cannot_use_the_gpu_is_said_with_a_way_out_that_works(tmp_path: Path) -> None:
    """What was installed by hand into the environment would be deleted by the next try, so pip itself is to find it."""
    for name in ("pyproject.toml", "launch/setup.sh", "launch/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    programs = {"python": FAKE_PYTHON.format(python=sys.executable), "nvidia-smi": "#!/bin/sh\n"}
    for name, text in programs.items():
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "source launch/setup.sh"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHON": str(tmp_path / "bin/python")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "as PyTorch's own instructions say" in done.stderr
    assert "PIP_INDEX_URL" in done.stderr
    assert not re.search(r"\w+\.\w+/|--index-url", done.stderr), "no registry's host is named"
    assert not (tmp_path / ".venv/.revpatch").exists(), "the next try installs again"
