"""The demo as a person runs it: its figures, its output, its ledger; and the same first commit once more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import environment, rank_pid

from revpatch.ledger.audit import verify

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_demo_reaches_its_figures_and_repeats_itself(tmp_path: Path) -> None:
    run = tmp_path / "one"
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
    subprocess.run([sys.executable, str(ROOT / "tools/demo_figures.py"), str(run), "--json", str(figures)], check=False)
    wrong = [row for row in json.loads(figures.read_text())["figures"] if not row["holds"] and row["unit"] != "s"]
    assert not wrong
    again = commits_of_a_demo_that_is_stopped_after_the_first(tmp_path / "two")
    assert again == commits(run)[:1]


def commits(run: Path) -> list[str]:
    journal = run / "ledger/journal.jsonl"
    events = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    return [event["sha256"] for event in events if event["event"] == "entry" and event["kind"] == "commit"]


def commits_of_a_demo_that_is_stopped_after_the_first(run: Path) -> list[str]:
    """Runs it again until its first phase is committed, then tells its ranks to stop, as a scheduler would."""
    command = ["bash", str(ROOT / "launch/demo.sh"), str(run)]
    with (run.parent / "two.log").open("w") as log:
        process = subprocess.Popen(command, cwd=run.parent, env=environment(), stdout=log, stderr=log)
        try:
            while not commits(run):
                assert process.poll() is None, (run.parent / "two.log").read_text()
                time.sleep(1)
            for rank in (0, 1):
                os.kill(rank_pid(process.pid, rank), signal.SIGTERM)
            assert process.wait(120) == 75, (run.parent / "two.log").read_text()
        finally:
            process.kill()
    return commits(run)
