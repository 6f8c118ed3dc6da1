"""The demo as a person runs it: its figures, its output, its ledger, its charts and its report in a browser; and the
same weights after its first 100 steps once more."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, Page
from pages import charts_of, corners_of, go_when_up, is_drawn, series_of, tensorboard, wait_for_text
from ranks import environment, rank_pid

from revpatch.config import Config
from revpatch.config.file import load_config
from revpatch.ledger.maintenance import verify
from revpatch.monitoring.tensorboard import layout_of

ROOT = Path(__file__).resolve().parent.parent
LOGGED = re.compile(r" (\w+) (\d+)/\d+ .*?  lm (\S+) .*  gate (\S+)  lr \S+  (\d+) tokens/s$", re.MULTILINE)
"""A line of train.log: phase, step, loss on new text, mean gate and tokens/s."""
pytestmark = pytest.mark.slow


@dataclass
class Demo:
    """A run of it; `said` is what it printed."""

    run: Path
    said: str

    @property
    def config(self) -> Config:
        return load_config(self.run / "config.yaml")

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.run / "ledger/journal.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def first_step(self, phase: str) -> int:
        """Steps of the run before this phase."""
        names = [each.name for each in self.config.phases]
        return sum(each.steps for each in self.config.phases[: names.index(phase)])

    def end(self, phase: str) -> int:
        return self.first_step(phase) + next(each.steps for each in self.config.phases if each.name == phase)

    def trained(self, phase: str) -> int:
        """Steps made in this phase: a regression after the last rollback that is allowed ends it."""
        steps = [event["step"] for event in self.events("rollback") if event["phase"] == phase]
        if len(steps) > self.config.rollback.max_rollbacks:
            return int(steps[-1])
        return self.end(phase) - self.first_step(phase)

    def probed(self) -> dict[int, dict[str, Any]]:
        """What each probe set was last measured as, by step of the run: TensorBoard keeps the last of a step."""
        starts = {self.first_step(e["phase"]): e["sets"] for e in self.events("entry") if e["kind"] == "start"}
        probes = {self.first_step(e["phase"]) + e["step"]: e["sets"] for e in self.events("probe")}
        commits = {self.end(e["phase"]): e["sets"] for e in self.events("commit")}
        return dict(sorted({**probes, **commits, 0: starts[0]}.items()))

    def happened(self, kind: str) -> list[int]:
        """The steps of the run at which a commit or a rollback was."""
        if kind == "commit":
            return [self.end(event["phase"]) for event in self.events(kind)]
        return [self.first_step(event["phase"]) + event["step"] for event in self.events(kind)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run once, from another folder than the checkout, as people do."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        ["bash", str(ROOT / "launch/demo.sh"), str(folder / "one")],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr.strip(), "nothing but the demo's own words reaches the person"
    return Demo(folder / "one", done.stdout)


def test_the_demo_reaches_its_figures(demo: Demo, tmp_path: Path) -> None:
    assert "held-out losses in nats per token" in demo.said
    learned, off = demo.said.split("gate learned:")[1].split("gate off:")
    assert off.split("\n\n")[0].strip() != learned.split("\n\n")[0].strip()
    assert f"revpatch ledger log {demo.run}" in demo.said
    assert verify(demo.run).ok
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "tools/demo_figures.py"), str(demo.run), "--json", str(figures)]
    subprocess.run(command, check=False)
    wrong = [row for row in json.loads(figures.read_text())["figures"] if not row["holds"] and row["unit"] != "s"]
    assert not wrong


def test_its_charts_hold_the_numbers_of_its_log(demo: Demo, browser: Browser) -> None:
    # The line that the demo ends with, as it is typed.
    typed = next(line for line in demo.said.splitlines() if line.strip().startswith("tensorboard "))
    command, _, comment = typed.partition("#")
    with tensorboard(shlex.split(command), demo.run.parent) as address:
        place = re.search(r"localhost:6006/(\S+) is the overview", comment)
        assert place is not None
        page = go_when_up(browser, f"{address}{place[1]}")
        charts = charts_of(page, layout_of(demo.config, None))
        numbers_are_those_of_the_log(demo, charts)
        for name in (each.name for each in demo.config.probes.sets):
            losses_and_marks_are_drawn(demo, charts[f"{name}: loss, phase start, limits, marks"], name)
        assert not page.errors
        page.go(f"{address}?tab#text")
        what_happened_is_told(demo, page)
        page.close()


def numbers_are_those_of_the_log(demo: Demo, charts: dict[str, Any]) -> None:
    """Every line of train.log and every probe of the journal."""
    for title, key, names in (
        ("held-out loss of the new corpora", "loss", [phase.name for phase in demo.config.phases]),
        ("mean gate on each held-out set", "gate", [each.name for each in demo.config.probes.sets]),
        ("patch norm on each held-out set", "patch_norm", [each.name for each in demo.config.probes.sets]),
    ):
        for name in names:
            expected = {step: sets[name][key] for step, sets in demo.probed().items()}
            assert series_of(charts[title], "tensorboard", f"probe/{name}/{key}") == pytest.approx(expected, rel=1e-5)
    lines = LOGGED.findall((demo.run / "train.log").read_text())
    steps = [demo.first_step(phase) + int(step) for phase, step, *_ in lines]
    every = demo.config.monitoring.every
    due = {
        demo.first_step(p.name) + step
        for p in demo.config.phases
        for step in range(every, demo.trained(p.name) + 1, every)
    }
    assert due <= set(steps)
    loss = series_of(charts["training loss on new text, nats per token"], "tensorboard", "loss/lm")
    speed = series_of(charts["tokens a second"], "tensorboard", "speed/tokens_per_second")
    gates = [
        series_of(charts["mean gate of each layer"], "tensorboard", f"gate/layer_{layer:02d}")
        for layer in range(len(charts["mean gate of each layer"]["series"]))
    ]
    assert list(loss) == list(speed) == steps
    for step, (_, _, lm, gate, tokens) in zip(steps, lines, strict=True):
        assert f"{loss[step]:.4g}" == lm
        assert speed[step] == pytest.approx(float(tokens), abs=0.51)
        assert sum(of[step] for of in gates) / len(gates) == pytest.approx(float(gate), abs=0.0051)


def losses_and_marks_are_drawn(demo: Demo, chart: dict[str, Any], name: str) -> None:
    """A probe's losses and every commit and rollback, in colours of their own."""
    losses = {step: sets[name]["loss"] for step, sets in demo.probed().items()}
    assert series_of(chart, "tensorboard", f"probe/{name}/loss") == pytest.approx(losses, rel=1e-5)
    lines = [(corners_of(line["path"]), line["colour"]) for line in chart["lines"] if line["path"]]
    ((loss, colour),) = [
        (c[0], colour) for c, colour in lines if len(c) == 1 and is_drawn(c[0], list(losses), list(losses.values()))
    ]
    step_at = np.poly1d(np.polyfit([x for x, _ in loss], list(losses), 1))
    colours = {colour}
    for kind in ("commit", "rollback"):
        steps = demo.happened(kind)
        assert steps, "the demo has both"
        shown = series_of(chart, f"tensorboard/{kind}", f"mark/{name}/{kind}")
        assert list(shown) == [step - back for step in steps for back in (2, 1, 0)]
        tops = [step - 1 for step in steps]  # of the strokes
        colours |= {
            colour
            for c, colour in lines
            if [len(stroke) for stroke in c] == [2] * len(steps)
            and np.allclose([step_at(stroke[1][0]) for stroke in c], tops, atol=0.5)
        }
    assert len(colours) == 3, "losses, commits and rollbacks are drawn, in a colour each"


def what_happened_is_told(demo: Demo, page: Page) -> None:
    """Why it was rolled back, and the samples of every commit, as the journal has them."""

    def shown(text: str) -> str:
        return " ".join(text.split())

    reasons = [shown(event["reason"]) for event in demo.events("rollback")]
    samples = demo.events("samples")
    assert len(samples) == 1 + len(demo.config.phases)
    texts = [shown(f"{text['prompt']} ▸ {text['text']}") for event in samples for text in event["texts"]]
    wait_for_text(page, *reasons, *texts)


def test_its_report_holds_the_numbers_of_its_journal(demo: Demo, browser: Browser) -> None:
    subprocess.run([sys.executable, "-m", "revpatch", "report", str(demo.run), "--html"], check=True, cwd=ROOT)
    page = browser.open((demo.run / "report.html").as_uri(), 1280, 900)
    cells = page.evaluate("[...document.querySelectorAll('.matrix td')].map(e => e.innerText)")
    rows = [demo.probed()[step] for step in (0, *demo.happened("commit"))]
    assert cells == [f"{-values['loss']:.3f}" for row in rows for values in row.values()]
    points = set(page.evaluate("[...document.querySelectorAll('figure circle title')].map(e => e.textContent)"))
    probes = {demo.first_step(event["phase"]) + event["step"]: event for event in demo.events("probe")}
    expected = {f"tokens/s at {step}: {event['training']['tokens_per_second']:.4f}" for step, event in probes.items()}
    expected |= {f"new text at {step}: {event['training']['lm']:.4f}" for step, event in probes.items()}
    for step, event in probes.items():
        for name, values in event["sets"].items():
            expected |= {f"{name} at {step}: {values[key]:.4f}" for key in ("loss", "gate")}
    assert expected <= points, expected - points
    for kind in ("commit", "rollback"):
        marks = f"figure:nth-child(2) .mark.{kind}"
        assert page.evaluate(f"document.querySelectorAll('{marks}').length") == len(demo.events(kind)) > 0
    words = " ".join(page.evaluate("document.body.textContent").split())
    texts = [text["text"] for event in demo.events("samples") for text in event["texts"]]
    reasons = [event["reason"] for event in demo.events("rollback")]
    assert not [text for text in (*texts, *reasons) if " ".join(text.split()) not in words]
    page.close()


def test_the_demo_repeats_itself(demo: Demo, tmp_path: Path) -> None:
    """Its first 100 steps, bit for bit."""
    again = weights_of_a_demo_that_is_stopped(tmp_path / "two", entries=2)
    assert [step for step, _ in again] == [50, 100]
    assert again == good_entries(demo.run)[:2]


def good_entries(run: Path) -> list[tuple[int, str]]:
    """Step and hash of the weights that passed a probe, in their order."""
    journal = run / "ledger/journal.jsonl"
    events = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    good = [event for event in events if event["event"] == "entry" and event["kind"] == "good"]
    return [(event["step"], event["sha256"]) for event in good]


def weights_of_a_demo_that_is_stopped(run: Path, entries: int) -> list[tuple[int, str]]:
    """Runs it again until it has so many, then tells its ranks to stop, as a scheduler would."""
    command = ["bash", str(ROOT / "launch/demo.sh"), str(run)]
    with (run.parent / "two.log").open("w") as log:
        process = subprocess.Popen(command, cwd=run.parent, env=environment(), stdout=log, stderr=log)
        try:
            while len(found := good_entries(run)) < entries:
                assert process.poll() is None, (run.parent / "two.log").read_text()
                time.sleep(1)
            for rank in (0, 1):
                os.kill(rank_pid(process.pid, rank), signal.SIGTERM)
            assert process.wait(120) == 75, (run.parent / "two.log").read_text()
        finally:
            process.kill()
    return found[:entries]
