"""TensorBoard: the run's numbers as charts and pictures, what happened as text and marks; docs/RUNS.md lists the tags.

The first page to look at is `#custom_scalars`, laid out here. A mark is a series beside a probe's losses: at a commit,
a rollback or a quarantine it goes from the lowest to the highest value of the last three steps, a vertical line.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from revpatch.config import Config
from revpatch.monitoring.trackers import Trackers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


MAX_COLUMNS = 256
_ANCHORS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)
_WIDTH, _HEIGHT, TITLE_HEIGHT = 384, 192, 28


def colours(shares: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Viridis at shares in [0, 1], any shape (...): (..., 3) uint8, dark to light; what is not finite is grey."""
    finite = np.isfinite(shares)
    at = np.clip(np.where(finite, shares, 0.0), 0.0, 1.0) * (len(_ANCHORS) - 1)
    channels = [np.interp(at, np.arange(len(_ANCHORS)), _ANCHORS[:, c]) for c in range(3)]
    picture = np.stack(channels, axis=-1).round().astype(np.uint8)
    picture[~finite] = 128
    return picture


def ink_on(red: int, green: int, blue: int) -> str:
    """Black or white, whichever is read on a colour of 0 to 255 a channel."""
    return "#000000" if red * 0.3 + green * 0.6 + blue * 0.1 > 120 else "#ffffff"


class HeatMap:
    """Collects columns; neighbours are averaged when there are more than `MAX_COLUMNS`, so its memory is bounded."""

    def __init__(self) -> None:
        self._columns: list[NDArray[np.float64]] = []
        self._steps: list[int] = []
        self._stride = 1
        self._waiting: list[NDArray[np.float64]] = []

    def add(self, step: int, values: Sequence[float]) -> None:
        """The number of each layer at a step; always as many layers."""
        self._waiting.append(np.asarray(values, dtype=np.float64))
        if len(self._waiting) < self._stride:
            return
        self._columns.append(np.mean(self._waiting, axis=0))
        self._steps.append(step)
        self._waiting = []
        if len(self._columns) > MAX_COLUMNS:
            pairs = zip(self._columns[::2], self._columns[1::2], strict=False)
            odd = self._columns[len(self._columns) // 2 * 2 :]
            self._columns = [(a + b) / 2 for a, b in pairs]
            self._steps = self._steps[1::2]
            self._stride *= 2
            self._waiting = odd

    def grid(self) -> NDArray[np.float64]:
        """(layers, columns) float64."""
        return np.stack(self._columns, axis=1) if self._columns else np.empty((0, 0))

    def picture(self, name: str) -> NDArray[np.uint8] | None:
        """(height, width, 3) uint8, with a title that says what the colours mean; None if nothing was added."""
        from PIL import Image, ImageDraw

        grid = self.grid()
        if not grid.size:
            return None
        finite = grid[np.isfinite(grid)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        cells = colours((grid - low) / max(high - low, 1e-12))
        height, width = (max(1, whole // count) for whole, count in zip((_HEIGHT, _WIDTH), grid.shape, strict=True))
        body = cells.repeat(height, axis=0).repeat(width, axis=1)
        whole = Image.new("RGB", (max(body.shape[1], _WIDTH), body.shape[0] + TITLE_HEIGHT), "white")
        whole.paste(Image.fromarray(body), (0, TITLE_HEIGHT))
        title = f"{name}: {low:.3g} (dark) to {high:.3g} (light)\nlayers downwards, steps {self._steps[0]} to "
        ImageDraw.Draw(whole).text((2, 0), f"{title}{self._steps[-1]}", fill="black")
        return np.asarray(whole)


MARKS = ("commit", "rollback", "quarantine")
DRAWN_BESIDE = ("phase_start", "limit", "commit_limit", *MARKS)
"""The last words of the tags that are written as runs of their own: TensorBoard colours by run."""

Layout = dict[str, dict[str, tuple[str, list[str]]]]
"""Category, chart, and its kind with the patterns of its tags, as `SummaryWriter.add_custom_scalars` takes it."""


def layout_of(config: Config, peak: float | None) -> Layout:
    """Return the page for the probes and parts that this config has; `peak`: of a device, if it is known."""
    probes = [probe.name for probe in config.probes.sets]
    taught = [probe.name for probe in config.probes.sets if probe.guard_after is not None]
    forgetting = {
        f"{name}: loss, phase start, limits, marks": _lines(
            *(f"probe/{name}/{line}" for line in ("loss", "phase_start", "limit", "commit_limit")),
            *(f"mark/{name}/{mark}" for mark in MARKS),
        )
        for name in probes
    }
    costs = {
        "tokens a second": _lines("speed/tokens_per_second"),
        "seconds of each part of a step": _lines(
            *(f"time/{part}" for part in ("step", "waiting_for_data", "forward", "backward", "all_reduce", "optimizer"))
        ),
        "seconds of probes, snapshots, samples and log lines": _lines(
            *(f"time/{what}" for what in ("probe", "snapshot", "samples", "logging"))
        ),
        "memory of rank 0, 10⁹ bytes": _lines("memory/peak_gb"),
        "gradient bytes reduced a step": _lines("wire/bytes_a_step"),
        "share of the teacher's states found in its cache": _lines("teacher/cache_hit_rate"),
    }
    if peak is not None:
        costs["share of peak"] = _lines("speed/share_of_peak")
    return {
        "1. Is it learning?": {
            "training loss on new text, nats per token": _lines("loss/lm"),
            **({"held-out loss of the new corpora": _of_probes(taught, "loss")} if taught else {}),
            "the whole objective": _lines("loss/loss"),
        },
        **({"2. Is it forgetting?": forgetting} if forgetting else {}),
        "3. Is the patch small and local?": {
            **({"mean gate on each held-out set": _of_probes(probes, "gate")} if probes else {}),
            **({"share of tokens whose gate is below 0.1": _of_probes(probes, "sparsity")} if probes else {}),
            **({"patch norm on each held-out set": _of_probes(probes, "patch_norm")} if probes else {}),
            **{
                f"{name}: share of tokens whose gate is below 0.1, of each layer": _lines(
                    rf"sparsity_on_{name}/layer_\d+"
                )
                for name in probes
            },
            "mean gate of each layer": _lines(r"gate/layer_\d+"),
            "patch norm of each layer": _lines(r"patch_norm/layer_\d+"),
            "scale of each layer": _lines(r"scale/layer_\d+"),
        },
        "4. What does it cost?": costs,
    }


def hyperparameters(config: Config, facts: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return what tells one run from another: the knobs of the config by dotted name, and on what it runs."""
    found: dict[str, bool | int | float | str] = {"seed": config.seed}
    for section in ("sidecar", "teacher", "objective", "optimizer", "batch", "replay", "rollback", "engine"):
        for key, value in config.model_dump(mode="json")[section].items():
            found[f"{section}.{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    base = config.base
    found |= {"base.model": base.model, "base.dtype": base.dtype, "base.block_size": base.block_size}
    found["probes.every"] = config.probes.every
    found["phases"] = ", ".join(f"{phase.name} {phase.steps}" for phase in config.phases)
    return {**found, "ranks": facts["ranks"], "device": facts["device"]}


def _of_probes(names: Sequence[str], line: str) -> tuple[str, list[str]]:
    return _lines(*(f"probe/{name}/{line}" for name in names))


def _lines(*patterns: str) -> tuple[str, list[str]]:
    """Return a chart; TensorBoard matches its patterns from the start of a tag only."""
    return "Multiline", [f"^{pattern}$" for pattern in patterns]


def without_tensorflow() -> None:
    """Comes before anything of tensorboard is imported. It imports TensorFlow where there is one: seconds of start-up,
    and its greetings in the terminal. This module's presence is tensorboard's own switch for going without."""
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))


log = logging.getLogger("revpatch")

_FLUSH_SECONDS = 10
_PADDING = 0.05
"""Nats per token that a mark goes beyond the only loss that a chart has shown."""


class Board:
    """Writes event files into `directory` (created with its parents) if `enabled`, else nothing at all; every number
    also goes to the `trackers`, if there are any. Limits and marks are in folders of `directory`, each of which
    TensorBoard takes for a run of its own, with a name and a colour.

    `purge_step`: after a resume, the first step that is written again, where a text says so; TensorBoard then hides
    what an earlier process wrote of a tag from there on, once it is written again. A disk that fails is named in the
    log, and the event files are left out from then on. Raises ImportError if tensorboard is not installed. Numbers are
    floats or what `float()` takes (one synchronisation each, for a tensor on a GPU); NaN is kept.
    """

    def __init__(
        self, directory: Path, enabled: bool = True, purge_step: int | None = None, trackers: Trackers | None = None
    ) -> None:
        self._directory, self._purge_step = directory, purge_step
        self._disk = _Disk()
        self._writer = _Writer(self._disk, directory, purge_step) if enabled else None
        self._beside: dict[str, _Writer] = {}
        self._trackers = trackers
        self._heat: dict[str, HeatMap] = {}
        self._ranges: dict[str, tuple[float, float]] = {}
        self._texts: dict[str, tuple[int, list[str]]] = {}
        if purge_step is not None:
            self.text(
                purge_step,
                "event/resume",
                "resumed from here; what is shown of later steps was undone, unless it was written again",
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point on the chart of each tag."""
        if self._writer is not None:
            for tag, value in values.items():
                self._line(tag.rpartition("/")[2]).add_scalar(tag, float(value), step)
        if self._trackers is not None:
            self._trackers.log(step, {tag: float(value) for tag, value in values.items()})

    def probe(self, step: int, name: str, values: Mapping[str, Any]) -> None:
        """A probe as the journal has it, losses in nats per token: `limit` is its tolerance above the last good state
        (`reference`), `commit_limit` above its phase's start; a set that is not guarded yet has neither."""
        lines = {"loss": values["loss"], "phase_start": values["before"]}
        if values["guarded"]:
            lines["reference"], lines["rise"] = values["reference"], values["loss"] - values["reference"]
            lines["limit"] = values["reference"] + values["tolerance"]
            lines["commit_limit"] = values["before"] + values["tolerance"]
        others = {key: values[key] for key in ("gate", "sparsity", "patch_norm") if values.get(key) is not None}
        self.scalars(step, {f"probe/{name}/{key}": value for key, value in {**lines, **others}.items()})
        self.has_shown(name, [float(value) for key, value in lines.items() if key != "rise"])

    def has_shown(self, name: str, losses: Sequence[float]) -> None:
        """Return what the chart of a probe set holds besides, such as what an earlier process wrote: marks go from the
        lowest to the highest."""
        finite = [loss for loss in losses if np.isfinite(loss)]
        if finite:
            low, high = self._ranges.get(name, (np.inf, -np.inf))
            self._ranges[name] = min([low, *finite]), max([high, *finite])

    def layers(self, step: int, values: Mapping[str, Mapping[int, float]]) -> None:
        """For each key ("gate", "scale", "patch_norm") a number by layer: `gate/layer_00`, ...; their histogram over
        the layers; and a column of the picture that `heat_maps` draws."""
        for key, numbers in values.items():
            self.scalars(step, {f"{key}/layer_{layer:02d}": number for layer, number in numbers.items()})
            self.scalars(step, {f"{key}/mean": sum(numbers.values()) / len(numbers)})
            if self._writer is not None:
                column = list(numbers.values())
                self._heat.setdefault(key, HeatMap()).add(step, column)
                if np.isfinite(column).all():
                    self._writer.add_histogram(f"{key}/over_layers", np.asarray(column), step)

    def heat_maps(self, step: int) -> None:
        """The pictures layer × step of all that `layers` was given so far, by this process."""
        for key, heat in self._heat.items():
            picture = heat.picture(key)
            if self._writer is not None and picture is not None:
                self._writer.add_image(f"{key}/layer_by_step", picture, step, dataformats="HWC")

    def gates(self, step: int, name: str, layers: Mapping[int, Sequence[float]]) -> None:
        """Return how the gates are spread over the tokens of a held-out set: for each layer, the share of tokens in
        each of equal bins from 0 to 1."""
        if self._writer is None:
            return
        for layer, shares in layers.items():
            counts = np.asarray(shares, dtype=np.float64)
            edges = np.linspace(0.0, 1.0, len(counts) + 1)
            centres = (edges[:-1] + edges[1:]) / 2
            self._writer.add_histogram_raw(
                f"gates_on_{name}/layer_{layer:02d}",
                min=0.0,
                max=1.0,
                num=float(counts.sum()),
                sum=float(counts @ centres),
                sum_squares=float(counts @ centres**2),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )

    def text(self, step: int, tag: str, markdown: str) -> None:
        """A note, such as why the patch was rolled back. TensorBoard shows the last of a step and tag: notes of one
        step are joined."""
        if self._writer is not None:
            last, before = self._texts.get(tag, (step, []))
            texts = [*before, markdown] if last == step else [markdown]
            self._texts[tag] = step, texts
            self._writer.add_text(tag, "\n\n".join(texts), step)

    def mark(self, step: int, kind: str) -> None:
        """Draw a line, as good as vertical, in the chart of every probe that has been measured; `kind` is one of
        `MARKS`. TensorBoard keeps one point a step, so it takes the last three; none is later, or a run that resumes
        here would have it purged."""
        for name, (low, high) in self._ranges.items():
            if self._writer is not None:
                low, high = (low, high) if low < high else (low - _PADDING, high + _PADDING)
                for back, end in ((2, low), (1, high), (0, np.nan)):  # the NaN: it isn't joined with the next mark
                    self._line(kind).add_scalar(f"mark/{name}/{kind}", end, step - back)

    def introduce(self, layout: Layout, hyperparameters: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """The page of charts; the run's row in the HParams tab, with the tags that are its results."""
        if self._trackers is not None:
            self._trackers.configure(hyperparameters)
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_custom_scalars(layout)
        experiment, start, self._end = hparams(dict(hyperparameters), dict.fromkeys(metrics, 0.0))
        for summary in (experiment, start):
            self._writer.add_summary(summary)

    def finished(self) -> None:
        """Every phase is committed: says so in the HParams tab. Comes after `introduce`."""
        if self._writer is not None:
            self._writer.add_summary(self._end)

    def close(self) -> None:
        """Writes what is still in memory, and closes the file; closing twice is fine."""
        if self._writer is not None:
            for writer in (self._writer, *self._beside.values()):
                writer.close()
        if self._trackers is not None:
            self._trackers.close()

    def _line(self, name: str) -> _Writer:
        """Return the writer of what ends with this name in its tag."""
        assert self._writer is not None
        if name not in DRAWN_BESIDE:
            return self._writer
        if name not in self._beside:
            self._beside[name] = _Writer(self._disk, self._directory / name, self._purge_step)
        return self._beside[name]

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Disk:
    """The disk of a board's event files. Once it has failed, nothing more is written to it: charts are no reason to
    stop training, and what belongs into them is in the journal too."""

    def __init__(self) -> None:
        self._failed = False

    def write(self, directory: Path, act: Callable[[], Any]) -> Any:
        """Return what `act` gives; None where it raised OSError, or anything did before."""
        if self._failed:
            return None
        try:
            return act()
        except OSError as error:
            self._failed = True
            reason = error.strerror or error
            log.warning("%s can't be written (%s): TensorBoard's files are left out from here on", directory, reason)
            return None


class _Writer:
    """A SummaryWriter, each method of which does nothing once the disk has failed."""

    def __init__(self, disk: _Disk, directory: Path, purge_step: int | None) -> None:
        self._disk, self._directory = disk, directory
        self._made = disk.write(directory, lambda: _open_writer(directory, purge_step))

    def add_summary(self, summary: Any) -> None:
        """Writes a summary of tensorboard's own."""
        self._disk.write(self._directory, lambda: self._made.file_writer.add_summary(summary))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._disk.write(
            self._directory, lambda: getattr(self._made, name)(*args, **kwargs)
        )


def _quiet_thread(before: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return a hook for what ends a thread, which leaves out tensorboard's: it hands its error to the next call as
    well."""

    def hook(ended: Any) -> None:
        if not type(ended.thread).__module__.startswith("tensorboard."):
            before(ended)

    hook.knows_tensorboard = True  # type: ignore[attr-defined]
    return hook


def _open_writer(directory: Path, purge_step: int | None) -> SummaryWriter:
    without_tensorflow()
    from torch.utils.tensorboard import SummaryWriter

    if not hasattr(threading.excepthook, "knows_tensorboard"):
        threading.excepthook = _quiet_thread(threading.excepthook)
    directory.mkdir(parents=True, exist_ok=True)
    return SummaryWriter(str(directory), purge_step=purge_step, flush_secs=_FLUSH_SECONDS)
