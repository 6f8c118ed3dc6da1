"""TensorBoard's page in the browser of tests: started, opened, and read as to what its charts hold and draw."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from browser import Browser, Page
from ranks import environment, free_port

from revpatch.monitoring.tensorboard import Layout

ROOT = Path(__file__).resolve().parent.parent
CHARTS = """(() => {
  const all = (node, name, found) => {
    if (node.localName === name) found.push(node);
    if (node.shadowRoot) all(node.shadowRoot, name, found);
    for (const child of node.childNodes) all(child, name, found);
    return found;
  };
  return all(document, 'tf-custom-scalar-multi-line-chart-card', []).map(card => ({
    title: card.__data.title,
    series: Object.values(card.__data._nameToDataSeries || {}).map(s => ({
      run: s.run, tag: s.tag, points: s.scalarData.map(p => [p.step, String(p.scalar)])})),
    lines: all(card, 'path', []).filter(p => p.getAttribute('class') === 'line').map(p => ({
      path: p.getAttribute('d') || '', colour: getComputedStyle(p).stroke}))
  }));
})()"""
"""What the page's charts are made of: their data, and the lines that are drawn."""


def tensorboard_as_told(runs: Path) -> list[str]:
    """The command of docs/RUNS.md, for the runs in another folder."""
    (line,) = [line for line in (ROOT / "docs/RUNS.md").read_text().splitlines() if line.startswith("    tensorboard ")]
    program, *options = shlex.split(line)
    return [sys.executable, "-m", f"{program}.main", *(str(runs) if each == "runs" else each for each in options)]


@contextmanager
def tensorboard(command: Sequence[str], folder: Path) -> Iterator[str]:
    """The address of a TensorBoard that this command starts, with a free port added; its log is in `folder`."""
    port = free_port()
    with (folder / "tensorboard.log").open("w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], env=environment(), stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(20)


def go_when_up(browser: Browser, url: str) -> Page:
    page = browser.open("about:blank", 1400, 9000)
    page.go_until(url, "document.title === 'TensorBoard'")
    return page


def charts_of(page: Page, layout: Layout) -> dict[str, Any]:
    """The charts of the Custom Scalars tab by title, once each of the layout's has a line."""
    titles = [title for category in layout.values() for title in category]
    # A chart asks for its numbers when it comes into view; all are in view.
    filled = f"{CHARTS}.filter(c => c.lines.some(line => line.path)).length"
    page.wait_for(f"{CHARTS}.length === {len(titles)} && {filled} === {len(titles)}")
    charts = {chart["title"]: chart for chart in page.evaluate(CHARTS)}
    assert list(charts) == titles
    assert all(category in visible_text(page) for category in layout)
    return charts


def series_of(chart: dict[str, Any], run: str, tag: str) -> dict[int, float]:
    """What a chart holds of a tag of a run, by step."""
    (found,) = [series for series in chart["series"] if (series["run"], series["tag"]) == (run, tag)]
    return {step: float(value) for step, value in found["points"]}


def visible_text(page: Page) -> str:
    """All text, also that inside of components."""
    text: str = page.evaluate(
        "(() => { const walk = n => (n.nodeType === 3 ? n.textContent : "
        "['STYLE', 'SCRIPT'].includes(n.tagName) ? '' : "
        "[...(n.shadowRoot ? n.shadowRoot.childNodes : []), ...n.childNodes].map(walk).join(' ')); "
        "return walk(document.body).replace(/\\s+/g, ' '); })()"
    )
    return text


def wait_for_text(page: Page, *words: str) -> None:
    since = time.monotonic()
    while missing := [word for word in words if word not in visible_text(page)]:
        assert time.monotonic() - since < 60, f"{missing} not in: {visible_text(page)[:3000]}"
        time.sleep(0.5)


def corners_of(path: str) -> list[list[tuple[float, float]]]:
    """The strokes of an SVG path of M and L, each a list of corners."""
    strokes = [stroke for stroke in path.split("M") if stroke]
    return [[tuple(map(float, c.split(","))) for c in stroke.split("L")] for stroke in strokes]  # type: ignore[misc]


def is_drawn(corners: list[tuple[float, float]], steps: list[int], values: list[float]) -> bool:
    """Whether the corners are these points, on linear axes whose y grows downwards."""
    if len(corners) != len(steps):
        return False
    for pixels, numbers, sign in zip(zip(*corners, strict=True), (steps, values), (1, -1), strict=True):
        slope, offset = np.polyfit(numbers, pixels, 1)
        if sign * slope <= 0 or np.abs(np.polyval([slope, offset], numbers) - pixels).max() > 0.5:
            return False
    return True
