"""The demo as a person runs it, twice: its figures, its output, its ledger, and the same commits both times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import environment

from revpatch.ledger.audit import verify

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_demo_reaches_its_figures_and_repeats_itself(tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        # From another folder than the checkout, as people do.
        done = subprocess.run(
            ["bash", str(ROOT / "launch/demo.sh"), str(run)],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not done.stderr.strip(), "nothing but the demo's own words reaches the person"
        assert "held-out losses in nats per token" in done.stdout
        learned, off = done.stdout.split("gate learned:")[1].split("gate off:")
        assert off.split("\n\n")[0].strip() != learned.split("\n\n")[0].strip()
        assert f"revpatch ledger log {run}" in done.stdout
        assert verify(run).ok
    figures = tmp_path / "figures.json"
    subprocess.run(
        [sys.executable, str(ROOT / "tools/demo_figures.py"), *map(str, runs), "--json", str(figures)], check=False
    )
    wrong = [row for row in json.loads(figures.read_text())["figures"] if not row["holds"] and row["unit"] != "s"]
    assert not wrong
