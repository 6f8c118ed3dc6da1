"""Line charts as inline SVG: they scale with the page, and need no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 400, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 8, 8, 24
_MAX_POINTS = 1000


@dataclass(frozen=True)
class Line:
    """Points of one colour and name; `dashed` for what is no measurement."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step; `words` show when it is pointed at."""

    step: float
    kind: str
    words: str


def chart(title: str, lines: Sequence[Line], marks: Sequence[Mark]) -> str:
    """A <figure> with the lines over steps, the marks in it, and a legend; "" if no line has a point."""
    finite = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not finite:
        return ""
    left, right = _range([x for x, _ in finite] + [mark.step for mark in marks])
    low, high = _range([y for _, y in finite])
    pad = 0.05 * (high - low)
    low, high = low - pad, high + pad

    def x_of(step: float) -> float:
        return _LEFT + (step - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(left, right, low, high)]
    for mark in marks:
        x = f"{x_of(mark.step):.1f}"
        parts.append(
            f'<line class="mark {escape(mark.kind)}" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}">'
            f"<title>{escape(mark.words)}</title></line>"
        )
    for line in lines:
        dash = ' stroke-dasharray="4 3"' if line.dashed else ""
        for run in _unbroken(_thinned(line.points)):
            path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in run)
            parts.append(f'<polyline fill="none" stroke="{line.colour}" stroke-width="1.6"{dash} points="{path}"/>')
            if not line.dashed and len(run) <= 60:
                parts += (
                    f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.2" fill="{line.colour}">'
                    f"<title>{escape(line.name)} at {x:g}: {y:.4f}</title></circle>"
                    for x, y in run
                )
    kinds = dict.fromkeys(mark.kind for mark in marks)
    legend = [f'<span><i style="background:{line.colour}"></i>{escape(line.name)}</span>' for line in lines]
    legend += [f'<span><i class="{escape(kind)}"></i>{escape(kind)}</span>' for kind in kinds]
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<p class="legend">{"".join(legend)}</p></figure>'
    )


def _axes(left: float, right: float, low: float, high: float) -> str:
    bottom, parts = _HEIGHT - _BOTTOM, []
    for share in (0.0, 0.5, 1.0):
        y = _TOP + (1 - share) * (bottom - _TOP)
        value = low + share * (high - low)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{_label(value)}</text>')
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
        step = left + share * (right - left)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{step:,.0f}</text>')
    return "".join(parts)


def _label(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most `_MAX_POINTS`, evenly taken, and the last."""
    if len(points) <= _MAX_POINTS:
        return points
    stride = math.ceil(len(points) / _MAX_POINTS)
    return [*points[:-1:stride], points[-1]]


def _unbroken(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The stretches between points that are no numbers."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
