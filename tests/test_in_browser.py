"""TensorBoard and the report of a small run, in a real browser: the charts are there, and hold what the log has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from pages import (
    charts_of,
    corners_of,
    go_when_up,
    is_drawn,
    series_of,
    tensorboard,
    tensorboard_as_told,
    wait_for_text,
)
from ranks import RunServer
from toy import Toy

from revpatch.config.file import load_config
from revpatch.ledger.journal import Journal
from revpatch.monitoring.tensorboard import layout_of

pytestmark = pytest.mark.slow

STEPS = 12
WATCHED = {"tensorboard": True, "samples": {"max_new_tokens": 8}}


@pytest.fixture(scope="module")
def runs(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one whose first phase is harmed once and whose second each time, one of another rate."""
    folder = tmp_path_factory.mktemp("watched")
    config = toy.config_file(folder, monitoring=WATCHED, rollback={"max_rollbacks": 1})
    for name, harm, options in (
        ("one", [[0, 6], [1, 6], [1, 12]], []),
        ("two", [], ["--set", "optimizer.lr=5e-3"]),
    ):
        args = ["train", config, "--set", f"output_dir={folder}/runs/{name}", *options]
        assert server.run(*args, output=folder / f"{name}.log", harm=harm) == [0], (folder / f"{name}.log").read_text()
    return folder / "runs"


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    """TensorBoard's."""
    with tensorboard(tensorboard_as_told(runs), runs.parent) as address:
        yield address


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in Journal(run / "ledger/journal.jsonl", readonly=True).records() if e["event"] == kind]


def test_the_first_page_answers_with_the_numbers_of_the_log(browser: Browser, address: str, runs: Path) -> None:
    page = go_when_up(browser, f"{address}#custom_scalars&_smoothingWeight=0")
    charts = charts_of(page, layout_of(load_config(runs / "one/config.yaml"), None))

    first, second = events(runs / "one", "probe")[:2], events(runs / "one", "probe")[2:]
    chart = charts["base: loss, phase start, limits, marks"]
    before = first[0]["sets"]["base"]["before"]
    committed = [event["sets"]["base"]["loss"] for event in events(runs / "one", "commit")]
    # TensorBoard keeps the last point of a step: that of the commit, where there is one.
    losses = [before, first[0]["sets"]["base"]["loss"], committed[0], second[0]["sets"]["base"]["loss"], committed[1]]
    steps = [0, 6, 12, 18, 24]
    shown = series_of(chart, "one/tensorboard", "probe/base/loss")
    assert list(shown) == steps
    assert list(shown.values()) == pytest.approx(losses)
    limits = series_of(chart, "one/tensorboard/commit_limit", "probe/base/commit_limit")
    assert limits[0] == pytest.approx(before + 0.5)
    assert list(series_of(chart, "one/tensorboard/rollback", "mark/base/rollback")) == [4, 5, 6, 16, 17, 18, 22, 23, 24]
    commits = series_of(chart, "one/tensorboard/commit", "mark/base/commit")
    assert list(commits) == [10, 11, 12, 22, 23, 24]
    assert np.isnan(list(commits.values())[2::3]).all()

    # What is drawn: somewhere a line whose corners are those losses, and one that is three strokes of a step's width.
    corners = [corners_of(line["path"]) for line in chart["lines"]]
    assert any(len(c) == 1 and is_drawn(c[0], steps, losses) for c in corners)
    marks = [c for c in corners if len(c) == 3]
    assert marks
    assert all(len(stroke) == 2 for stroke in marks[0])
    of_the_others(charts, runs / "one", first)
    assert not page.errors
    page.close()


def of_the_others(charts: dict[str, Any], run: Path, probes: list[dict[str, Any]]) -> None:
    """A chart of the questions after the second, held against the journal."""

    def at(title: str, tag: str, step: int) -> float:
        return series_of(charts[title], f"{run.name}/tensorboard", tag)[step]

    sets, training = probes[0]["sets"]["first"], probes[0]["training"]
    assert at("mean gate on each held-out set", "probe/first/gate", 6) == pytest.approx(sets["gate"])
    assert at("patch norm on each held-out set", "probe/first/patch_norm", 6) == pytest.approx(sets["patch_norm"])
    title = "first: share of tokens whose gate is below 0.1, of each layer"
    layers = [at(title, f"sparsity_on_first/layer_{layer:02d}", 6) for layer in (0, 1)]
    assert np.mean(layers) == pytest.approx(sets["sparsity"], abs=1e-6)
    speed = at("tokens a second", "speed/tokens_per_second", 6)
    assert speed == pytest.approx(training["tokens_per_second"], rel=1e-5)


def test_texts_pictures_histograms_and_hyperparameters_are_shown(browser: Browser, address: str, runs: Path) -> None:
    page = go_when_up(browser, f"{address}#text")
    reason = events(runs / "one", "rollback")[0]["reason"].split(" nats")[0]
    wait_for_text(page, "first rolled back at 6", reason, "second committed")
    wait_for_text(page, "samples")
    page.go(f"{address}?tab#images")
    wait_for_text(page, "gate/layer_by_step")
    page.go(f"{address}?tab#histograms")
    wait_for_text(page, "gates_on_base")
    page.go(f"{address}?tab#hparams")
    wait_for_text(page, "one/tensorboard", "two/tensorboard", "batch.new_blocks")
    page.close()


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_the_report_fits_a_phone_and_a_desk(
    browser: Browser, runs: Path, tmp_path: Path, width: int, height: int
) -> None:
    file = tmp_path / "report.html"
    command = [sys.executable, "-m", "revpatch", "report", str(runs / "one"), "--out", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    page = browser.open(file.as_uri(), width, height)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= page.evaluate("innerWidth") == width
    sizes = "[...document.querySelectorAll('p,td,th,dd,li,small')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert page.evaluate(f"Math.min(...{sizes})") >= 13, "CSS pixels"
    scale = "e.getBoundingClientRect().width / e.viewBox.baseVal.width"  # what is drawn is scaled to the page
    text = "parseFloat(getComputedStyle(e.querySelector('text')).fontSize)"
    sizes = f"[...document.querySelectorAll('svg')].map(e => {text} * {scale})"
    assert page.evaluate(f"Math.min(...{sizes})") >= 12, "CSS pixels"
    assert [url for url in page.requested if not url.startswith("data:")] == [file.as_uri()], "nothing from elsewhere"
    words = page.evaluate("document.body.innerText")
    for word in ("plasticity", "stability", "locality", "patch magnitude", "ledger usefulness", "BWT", "rolled back"):
        assert word in words
    cells = page.evaluate("[...document.querySelectorAll('.matrix td')].map(e => e.innerText)")
    rows = [events(runs / "one", "entry")[0]["sets"], *(commit["sets"] for commit in events(runs / "one", "commit"))]
    assert cells == [f"{-values['loss']:.3f}" for row in rows for values in row.values()]
    drawn = page.evaluate("[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().width)")
    assert len(drawn) == 6
    assert min(drawn) > 250
    assert page.evaluate("document.querySelectorAll('figure:nth-child(2) .mark.rollback').length") == 3
    page.close()
