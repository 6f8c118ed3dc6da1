"""The report as one HTML file: no script, nothing from elsewhere, curves as inline SVG, from a phone's width up.

report.html is the page, a template that escapes every text; here are the numbers that it draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from revpatch.monitoring.tensorboard import colours, ink_on
from revpatch.report import MEASURES, VERDICTS, Report
from revpatch.report.history import Matrix, TimelineEvent

Points = Sequence[tuple[float, float]]

_MAX_POINTS = 1000
_COLOURS = ("#1f77b4", "#d95f02", "#7b3fa0", "#1b9e77", "#b8860b", "#c2185b", "#5d6d7e", "#8c564b")
_MARKED = ("commit", "rollback", "quarantine")


@dataclass(frozen=True)
class Line:
    """Points of one colour and name; `dashed` for what is no measurement."""

    name: str
    points: Points
    colour: str
    dashed: bool = False

    def stretches(self) -> list[Points]:
        """Return at most `_MAX_POINTS`, evenly taken, and the last, in stretches between those that are no numbers."""
        stride = math.ceil(len(self.points) / _MAX_POINTS) or 1
        found: list[list[tuple[float, float]]] = [[]]
        for point in [*self.points[:-1:stride], *self.points[-1:]]:
            if math.isfinite(point[1]):
                found[-1].append(point)
            else:
                found.append([])
        return [stretch for stretch in found if stretch]


class Chart:
    """Lines over the steps of a run, with vertical marks in it, on an SVG of `WIDTH` × `HEIGHT`."""

    WIDTH, HEIGHT = 400, 220
    LEFT, RIGHT, TOP, BOTTOM = 56, 392, 8, 196

    def __init__(self, title: str, lines: Sequence[Line], marks: Sequence[TimelineEvent]) -> None:
        self.title, self.lines, self.marks = title, lines, marks
        finite = [point for line in lines for stretch in line.stretches() for point in stretch]
        self.empty = not finite
        self.steps = _range([x for x, _ in finite] + [mark.step for mark in marks])
        low, high = _range([y for _, y in finite])
        self.values = low - 0.05 * (high - low), high + 0.05 * (high - low)

    def x(self, step: float) -> str:
        """Return where a step lies."""
        share = (step - self.steps[0]) / (self.steps[1] - self.steps[0])
        return f"{self.LEFT + share * (self.RIGHT - self.LEFT):.1f}"

    def y(self, value: float) -> str:
        """Return where a value lies."""
        share = (value - self.values[0]) / (self.values[1] - self.values[0])
        return f"{self.BOTTOM - share * (self.BOTTOM - self.TOP):.1f}"

    def ticks(self) -> Iterator[tuple[float, float, str, str]]:
        """Yield a step and a value at the start, in the middle and at the end of the axes, each with its label."""
        for share in (0.0, 0.5, 1.0):
            step, value = (low + share * (high - low) for low, high in (self.steps, self.values))
            yield step, value, f"{step:,.0f}", f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=0.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def page_of(report: Report) -> str:
    """Return the whole document."""
    source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    charts = [chart for chart in charts_of(report) if not chart.empty]
    count = max((len(texts) for _, texts in report.run.samples), default=0)
    prompts = [[(after, texts[n]) for after, texts in report.run.samples if n < len(texts)] for n in range(count)]
    return environment.from_string(source).render(
        report=report, run=report.run, verdicts=VERDICTS, meanings=MEASURES, charts=charts, prompts=prompts, cell=_cell
    )


def _cell(matrix: Matrix, row: int, column: int) -> str:
    """Return the colours of a cell of the matrix."""
    red, green, blue = (int(channel) for channel in colours(matrix.shares[row, column]))
    return f"background:rgb({red},{green},{blue});color:{ink_on(red, green, blue)}"


def charts_of(report: Report) -> list[Chart]:
    """Return the curves: training loss, every probe with its phases' starts and limits, gates, and speed."""
    run = report.run
    marks = [event for event in run.happenings if event.kind in _MARKED]
    points = [point for phase in run.phases for point in phase.probes]
    trained, speed = (
        [(point.step, point.training[key]) for point in points if key in point.training]
        for key in ("lm", "tokens_per_second")
    )
    charts = [Chart("training loss on new text, nats per token", [Line("new text", trained, _COLOURS[0])], marks)]
    gates = []
    for number, name in enumerate(run.taught_by):
        colour = _COLOURS[number % len(_COLOURS)]
        losses: list[tuple[float, float]] = []
        limits: list[tuple[float, float]] = []
        for phase in run.phases:
            if name not in phase.start:
                continue
            start = phase.start[name]
            losses.append((phase.first_step, start.loss))
            losses += ((point.step, point.sets[name].loss) for point in phase.probes)
            losses += [] if phase.commit is None else [(phase.end, phase.commit[name].loss)]
            if start.guarded:
                limit = start.loss + run.tolerances[name]
                limits += ((phase.first_step, limit), (phase.end, limit), (phase.end, math.nan))
        lines = [Line(name, losses, colour)]
        lines += [Line("limit for a commit", limits, "#888", dashed=True)] if limits else []
        charts.append(Chart(f"held-out loss of {name}, nats per token", lines, marks))
        gates.append(Line(name, [(point.step, point.sets[name].gate) for point in points], colour))
    charts.append(Chart("mean gate on each held-out set", gates, marks))
    charts.append(Chart("tokens a second", [Line("tokens/s", speed, _COLOURS[3])], marks))
    return charts
