"""The set-up script, with a stub for Python: a failed install is never taken for a finished one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKE_PYTHON = """#!/bin/sh
case "$*" in
*_base_executable*) echo "$0" ;;
*cuda.is_available*) exit 1 ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip "*) exit {pip} ;;
*) exec {python} "$@" ;;
esac
"""


@pytest.mark.parametrize(("pip", "words"), [(1, "pip failed"), (0, "as PyTorch's own instructions say")])
def test_a_set_up_that_fails_stops_and_is_tried_again(tmp_path: Path, pip: int, words: str) -> None:
    """pip fails, or it installs a torch that can't use the GPU."""
    for name in ("pyproject.toml", "launch/setup.sh", "launch/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("python", FAKE_PYTHON.format(python=sys.executable, pip=pip)),
        ("nvidia-smi", "#!/bin/sh\n"),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "bin/python")}
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-c", "set -euo pipefail; source launch/setup.sh; echo went on"],
            cwd=tmp_path,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1 and words in done.stderr
        assert "installing into" in done.stdout, "the second try installs again"
        assert "went on" not in done.stdout
        assert not (tmp_path / ".venv/.revpatch").exists()
        if pip == 0:
            # What is installed by hand into the environment would be deleted by the next try: pip itself is to find it.
            assert "PIP_INDEX_URL" in done.stderr
            assert not re.search(r"\w+\.\w+/|--index-url", done.stderr), "no registry's host is named"
