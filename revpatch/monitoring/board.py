"""TensorBoard: the run's numbers as charts and pictures, what happened as text and marks; docs/RUNS.md lists the tags.

The first page to look at is `#custom_scalars`: see `layout`. Only the rank that writes has an enabled board; the
others hold one that does nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from revpatch.monitoring.heat_map import HeatMap
from revpatch.monitoring.layout import DRAWN_BESIDE, Layout
from revpatch.monitoring.trackers import Trackers
from revpatch.monitoring.written import tags_from, without_tensorflow

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("revpatch")

_FLUSH_SECONDS = 10
_PADDING = 0.05
"""Nats per token that a mark goes beyond the only loss that a chart has shown."""


class Board:
    """Writes event files into `directory` (created with its parents) if `enabled`, else nothing at all; every number
    also goes to the `trackers`, if there are any. Limits and marks are in folders of `directory`, each of which
    TensorBoard takes for a run of its own, with a name and a colour.

    `purge_step`: after a resume, the first step that will be written again; TensorBoard then hides what an earlier
    process wrote from there on: numbers when their tags are written again; marks and texts of events, which may not
    happen again, at once, with a text that says so. A disk that fails is named in the log, and the event files are left
    out from then on. Raises ImportError if tensorboard is not installed. Numbers are floats or what `float()` takes
    (one synchronisation each, for a tensor on a GPU); NaN is kept.
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
        if enabled and purge_step is not None:
            self._hide_from(purge_step)

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
        """What the chart of a probe set holds besides, such as what an earlier process wrote: marks go from the lowest
        to the highest."""
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
        """How the gates are spread over the tokens of a held-out set: for each layer, the share of tokens in each of
        equal bins from 0 to 1."""
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
        """A line, as good as vertical, in the chart of every probe that has been measured; `kind` is one of
        `layout.MARKS`. TensorBoard keeps one point a step, so it takes the last three; none is later, or a run that
        goes on from here would have it purged."""
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

    def _hide_from(self, step: int) -> None:
        """Hides the lost steps of what an earlier process has written beside, and of events. The loader that
        TensorBoard prefers knows no purge: there a point hides those of its tag at its step and later ones that were
        written before it."""
        for line in DRAWN_BESIDE:
            if (self._directory / line).is_dir():
                writer = self._line(line)  # opened now, which says what is purged
                # At the end of a mark that is kept there is a NaN already; one that begins before is cut.
                for tag in tags_from(self._directory / line, step, "mark/"):
                    writer.add_scalar(tag, np.nan, step - 1)
        for tag in tags_from(self._directory, step, "event/"):
            self.text(step, tag.removesuffix("/text_summary"), "went on from here; what came later was undone")

    def _line(self, name: str) -> _Writer:
        """The writer of what ends with this name in its tag."""
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
        """What `act` gives; None where it raised OSError, or anything did before."""
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
    """A hook for what ends a thread, which leaves out tensorboard's: it hands its error to the next call as well."""

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
