"""The report as one HTML file: no script, nothing from elsewhere, curves as inline SVG, from a phone's width up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from revpatch.monitoring.tensorboard import colours, ink_on
from revpatch.report import MEASURES, VERDICTS, Check, Report
from revpatch.report.history import Matrix

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
    """Return a <figure> with the lines over steps, the marks in it, and a legend; "" if no line has a point."""
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
    """Return at most `_MAX_POINTS`, evenly taken, and the last."""
    if len(points) <= _MAX_POINTS:
        return points
    stride = math.ceil(len(points) / _MAX_POINTS)
    return [*points[:-1:stride], points[-1]]


def _unbroken(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Return the stretches between points that are no numbers."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


_COLOURS = ("#1f77b4", "#d95f02", "#7b3fa0", "#1b9e77", "#b8860b", "#c2185b", "#5d6d7e", "#8c564b")
_MARKED = ("commit", "rollback", "quarantine")
_STYLE = """
:root{color-scheme:light dark;--fg:#1c1f23;--bg:#fff;--soft:#667;--line:#d8dce2;--card:#f6f7f9}
@media(prefers-color-scheme:dark){:root{--fg:#e6e8eb;--bg:#15181c;--soft:#9aa4b0;--line:#343a42;--card:#1d2127}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:75rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg)}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}p{margin:.3rem 0}
small,.soft{color:var(--soft)}body,td,th,dd,pre{overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse}td,th{padding:.3rem .6rem;text-align:left;vertical-align:top}
.matrix td{text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:normal}.matrix th{overflow-wrap:normal}
@media(max-width:32rem){.matrix{font-size:.85rem}.matrix td,.matrix th{padding:.25rem .3rem}}
.own{outline:2px solid var(--fg);outline-offset:-3px}
details{border:1px solid var(--line);border-radius:.5rem;padding:.5rem .8rem;margin:.4rem 0;background:var(--card)}
summary{cursor:pointer}.v{display:inline-block;min-width:5.5rem;font-weight:600}
.pass{color:#16803c}.fail{color:#c62828}.none{color:var(--soft)}
@media(prefers-color-scheme:dark){.pass{color:#5fd38a}.fail{color:#ff7b72}}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}
figure{margin:0;padding:.6rem;border:1px solid var(--line);border-radius:.5rem;background:var(--card);min-width:0}
figcaption{font-weight:600;font-size:.95rem}svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:15px}svg .grid{stroke:var(--line)}.mark{stroke-width:1.5;opacity:.75}
.mark.commit{stroke:#16803c}.mark.rollback{stroke:#c62828}.mark.quarantine{stroke:#b8860b}
.legend{font-size:.85rem;display:flex;flex-wrap:wrap;gap:.2rem .9rem}
.legend i{display:inline-block;width:.9rem;height:.2rem;vertical-align:middle;margin-right:.3rem}
i.commit{background:#16803c}i.rollback{background:#c62828}i.quarantine{background:#b8860b}
dl{display:grid;grid-template-columns:minmax(7rem,auto) 1fr;gap:.2rem 1rem}dt{color:var(--soft)}dd{margin:0}
.text{white-space:pre-wrap;margin:.2rem 0}ol{padding-left:1.2rem}
"""


def page_of(report: Report) -> str:
    """Return the whole document. Every text of the journal is escaped."""
    title = f"revpatch: {report.run.directory.name}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(report.run.environment["state"])}; losses in nats per token, intervals of '
        f"{report.run.confidence:.0%}</p>",
        "<h2>Checklist</h2>",
        *([_check(check) for check in report.checks] or [f"<p>{escape(report.unjudged)}</p>"]),
    ]
    if report.matrix is not None:
        body += ["<h2>Every corpus after every phase</h2>", _matrix(report.matrix), _measures(report)]
    if charts := _charts(report):
        body += ["<h2>Curves</h2>", f'<div class="charts">{"".join(charts)}</div>']
    body += [_happenings(report), _samples(report), "<h2>Environment</h2>", _environment(report)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _verdict(passed: bool | None) -> str:
    word = VERDICTS[passed]
    return f'<span class="v {"none" if passed is None else word}">{word}</span>'


def _check(check: Check) -> str:
    rows = "".join(
        f"<tr><td>{_verdict(row.passed)}</td><td>{escape(row.what)}<br><small>{escape(row.figure)}</small></td></tr>"
        for row in check.rows
    )
    # What fails is open from the start.
    return (
        f"<details{' open' if check.passed is False else ''}><summary>{_verdict(check.passed)} "
        f"<strong>{escape(check.name)}</strong><br><small>{escape(check.figure)}</small></summary>"
        f'<p>{escape(check.question)}</p><div class="wide"><table>{rows}</table></div></details>'
    )


def _matrix(matrix: Matrix) -> str:
    values = matrix.values
    head = "".join(f"<th>{escape(name)}</th>" for name in matrix.sets)
    rows = []
    for i, row in enumerate(matrix.rows):
        cells = []
        for j, value in enumerate(values[i]):
            red, green, blue = (int(channel) for channel in colours(matrix.shares[i, j]))
            own = ' class="own"' if matrix.taught_by[j] == i and i else ""
            style = f"background:rgb({red},{green},{blue});color:{ink_on(red, green, blue)}"
            cells.append(f'<td{own} style="{style}">{value:.3f}</td>')
        rows.append(f"<tr><th>{escape(row)}</th>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="matrix"><tr><th>after</th>{head}</tr>{"".join(rows)}</table></div>'
        "<p><small>R = −loss; each column from its worst (dark) to its best (light); framed: the phase that teaches "
        "it.</small></p>"
    )


def _measures(report: Report) -> str:
    rows = []
    for name, meaning in MEASURES.items():
        found = report.measures.get(name)
        figure = "no corpus to take it from" if found is None else str(found)
        rows.append(f"<tr><th>{escape(name)}</th><td>{escape(figure)}<br><small>{escape(meaning)}</small></td></tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _charts(report: Report) -> list[str]:
    """Return the curves as <figure>s: the training loss, and every probe with its phases' starts and limits."""
    marks = [Mark(h.step, h.kind, f"step {h.step}: {h.words}") for h in report.run.happenings if h.kind in _MARKED]
    points = [point for phase in report.run.phases for point in phase.probes]
    trained = [(point.step, point.training["lm"]) for point in points if "lm" in point.training]
    speed = [(p.step, p.training["tokens_per_second"]) for p in points if "tokens_per_second" in p.training]
    charts = [chart("training loss on new text, nats per token", [Line("new text", trained, _COLOURS[0])], marks)]
    for number, name in enumerate(report.run.taught_by):
        losses: list[tuple[float, float]] = []
        limits: list[tuple[float, float]] = []
        for phase in report.run.phases:
            if name not in phase.start:
                continue
            start = phase.start[name]
            losses.append((phase.first_step, start.loss))
            losses += ((point.step, point.sets[name].loss) for point in phase.probes)
            losses += [] if phase.commit is None else [(phase.end, phase.commit[name].loss)]
            if start.guarded:
                limit = start.loss + report.run.tolerances[name]
                limits += ((phase.first_step, limit), (phase.end, limit), (phase.end, float("nan")))
        lines = [Line(name, losses, _COLOURS[number % len(_COLOURS)])]
        lines += [Line("limit for a commit", limits, "#888", dashed=True)] if limits else []
        charts.append(chart(f"held-out loss of {name}, nats per token", lines, marks))
    gates = [
        Line(name, [(p.step, p.sets[name].gate) for p in points], _COLOURS[number % len(_COLOURS)])
        for number, name in enumerate(report.run.taught_by)
    ]
    charts.append(chart("mean gate on each held-out set", gates, marks))
    charts.append(chart("tokens a second", [Line("tokens/s", speed, _COLOURS[3])], marks))
    return [figure for figure in charts if figure]


def _happenings(report: Report) -> str:
    items = "".join(
        f"<li><small>{escape(h.time)}, step {h.step}</small><br>{escape(h.words)}</li>" for h in report.run.happenings
    )
    return f"<h2>What happened</h2><ol>{items}</ol>" if items else ""


def _samples(report: Report) -> str:
    if not report.run.samples:
        return ""
    parts = ["<h2>Samples, before and after</h2>"]
    count = max(len(texts) for _, texts in report.run.samples)
    for number in range(count):
        of_prompt = [(after, texts[number]) for after, texts in report.run.samples if number < len(texts)]
        prompt = of_prompt[0][1].prompt
        versions = "".join(
            f'<dt>{escape(after)}</dt><dd class="text">{escape(sample.text)}</dd>' for after, sample in of_prompt
        )
        parts.append(f'<details open><summary class="text">{escape(prompt)}</summary><dl>{versions}</dl></details>')
    return "".join(parts)


def _environment(report: Report) -> str:
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in report.run.environment.items())}</dl>"
