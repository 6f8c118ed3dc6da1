"""What rank 0 writes and shows of a run: ledger, journal, TensorBoard, trackers, log lines, progress, the last table.

Every rank holds a `Record`; on the others it does nothing, so the trainer reads the same on all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from revpatch.config import Config
from revpatch.evaluation.probe import in_words, nearly_shut
from revpatch.ledger.events import BareBase, PhaseCommitted, ProbeReading, Readings, RunResumed, Sample
from revpatch.ledger.journal import Journal
from revpatch.ledger.ledger import Ledger, effective
from revpatch.monitoring.tensorboard import MARKS, Board, hyperparameters, layout_of
from revpatch.monitoring.trackers import Trackers
from revpatch.step.objective import TERMS
from revpatch.terminal import console


def print_summary(run: Path, console: Console) -> None:
    """One row a probe set and commit: loss before and after the phase, drift against tolerance, gate, patch norm.

    Raises JournalError for a damaged journal, FileNotFoundError if `run` holds none.
    """
    events = effective(Journal(run / "ledger/journal.jsonl", readonly=True).events(PhaseCommitted, RunResumed))
    title = Text(f"{run.name}: held-out losses in nats per token", style="table.title")
    table = Table(title=title, title_justify="left")
    for column in (
        "phase",
        "held-out set",
        "before",
        "after",
        "change",
        "since base",
        "tolerance",
        "gate",
        "patch norm",
    ):
        table.add_column(column, justify="left" if column in ("phase", "held-out set") else "right")
    for event in events:
        if not isinstance(event, PhaseCommitted):
            continue
        label = f"{event.phase}  ({event.rollbacks} rollbacks)"
        for name, reading in event.sets.items():
            table.add_row(label, name, *_cells(reading))
            label = ""
        table.add_section()
    console.print(table)


def _cells(reading: ProbeReading) -> list[str]:
    assert reading.before is not None and reading.base is not None  # the trainer knows both
    change, tolerance = reading.loss - reading.before, reading.tolerance
    colour = "green" if change <= tolerance else "red"
    return [
        f"{reading.before:.3f}",
        f"{reading.loss:.3f}",
        f"[{colour}]{change:+.3f}[/]" if reading.guarded else f"{change:+.3f}",
        f"{reading.loss - reading.base:+.3f}",
        f"{tolerance:g}" if reading.guarded else "not guarded",
        f"{reading.gate:.2f}",
        f"{reading.patch_norm:.3g}",
    ]


log = logging.getLogger("revpatch")


class Record:
    """The record of a run in `directory`.

    Args:
        directory: the run's folder, made by `prepare_run`.
        enabled: whether this is rank 0.
        tensorboard: whether to write event files.
        purge_step: of a run that resumes, the first step that TensorBoard gets anew.
        trackers: names of the services that get the same numbers.
    """

    def __init__(
        self,
        directory: Path,
        enabled: bool,
        tensorboard: bool,
        purge_step: int | None = None,
        trackers: Sequence[str] = (),
    ) -> None:
        self.enabled = enabled
        services = Trackers(trackers, directory) if enabled and trackers else None
        self.board = Board(directory / "tensorboard", enabled and tensorboard, purge_step, services)
        self.ledger = Ledger(directory / "ledger") if enabled else None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console) if enabled and console.is_terminal else None
        self._task: Any = None
        self.parent: str | None = None
        """sha256 of the entry from which the next one descends."""
        self.costs: Callable[[float], dict[str, float]] = lambda tokens_per_second: {}
        """What a step costs besides time, by tag."""
        self._training: dict[str, float] = {}
        self._waited = 0.0
        self.restart_clock()

    def introduce(self, config: Config, facts: Mapping[str, Any], peak: float | None) -> None:
        """Makes TensorBoard's page of charts, and the run's row among others with its hyperparameters. `peak`: of a
        device, 10¹² operations a second, if it is known."""
        if self.enabled:
            metrics = ["loss/lm", *(f"probe/{probe.name}/loss" for probe in config.probes.sets)]
            self.board.introduce(layout_of(config, peak), hyperparameters(config, facts), metrics)

    def event(self, name: str, **fields: Any) -> None:
        """A line in the journal."""
        if self.ledger is not None:
            self.ledger.journal.append(name, **fields)

    def entry(
        self,
        kind: str,
        phase_index: int,
        phase: str,
        step: int,
        patch: dict[str, Tensor],
        metadata: dict[str, Any],
        sets: Readings,
    ) -> tuple[str, str | None]:
        """Return an entry of the ledger, child of the one its weights come from; its file's name and sha256 ("" and
        None on other ranks)."""
        if self.ledger is None:
            return "", None
        known = {"kind": kind, "phase": phase, "phase_index": phase_index, "step": step}
        metadata = {**known, "parent": self.parent, **metadata}
        path, sha256 = self.ledger.record(kind, phase_index, phase, step, patch, metadata, sets=sets)
        self.parent = sha256
        if kind == "commit":
            log.info("commit %s  sha256 %s", path.name, sha256)
        return path.name, sha256

    def restart_clock(self) -> None:
        """Leaves what happened since the last log line, such as a probe, out of tokens/s."""
        self._since, self._tokens, self._steps, self._waited_before = time.monotonic(), 0, 0, self._waited

    def begin_phase(self, name: str, steps: int, done: int = 0) -> None:
        """Starts the phase's progress bar and clock."""
        self._waited = 0.0
        self.restart_clock()
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task(name, total=steps, completed=done)

    def advance(self, tokens: int, waited: float) -> None:
        """One optimizer step, of so many tokens over all ranks; `waited` is how many seconds the phase's steps have
        waited for data so far."""
        self._tokens += tokens
        self._steps += 1
        self._waited = waited
        if self._progress is not None:
            self._progress.advance(self._task)

    def end_phase(self) -> None:
        """Takes the bar down."""
        if self._progress is not None:
            self._progress.remove_task(self._task)
            self._progress.stop()

    def steps(
        self,
        phase: str,
        step: int,
        of: int,
        global_step: int,
        terms: Tensor,
        layers: Mapping[str, Tensor],
        indices: Sequence[int],
        rate: float,
        norm: Any,
        parts: Mapping[str, float],
    ) -> None:
        """The means since the last call: `terms` (len(TERMS),), `layers` by name (layers,), all on the CPU;
        `indices` are the blocks that the layers' sidecars follow, `parts` the seconds of a step's parts in all."""
        if not self.enabled:
            return
        seconds = max(time.monotonic() - self._since, 1e-9)
        speed, steps = self._tokens / seconds, max(self._steps, 1)
        waited = self._waited - self._waited_before
        whole = {"step": seconds, "waiting_for_data": waited, **parts}
        self.time(global_step, {name: part / steps for name, part in whole.items()})
        self.restart_clock()
        values = dict(zip(TERMS, terms.tolist(), strict=True))
        self._training = {**values, "tokens_per_second": speed}
        self.board.scalars(global_step, {f"loss/{name}": value for name, value in values.items()})
        costs = {"speed/tokens_per_second": speed, **self.costs(speed)}
        self.board.scalars(global_step, {"optimizer/lr": rate, **costs})
        if norm is not None:
            self.board.scalars(global_step, {"optimizer/grad_norm": float(norm)})
        numbered = {name: dict(zip(indices, numbers.tolist(), strict=True)) for name, numbers in layers.items()}
        self.board.layers(global_step, numbered)
        gate = float(layers["gate"].mean())
        losses = "  ".join(f"{name} {values[name]:.4g}" for name in TERMS if values[name])
        log.info("%s %d/%d  %s  gate %.2f  lr %.2g  %.0f tokens/s", phase, step, of, losses, gate, rate, speed)

    def probed(
        self,
        phase: str,
        step: int,
        global_step: int,
        sets: Readings,
        spreads: Mapping[str, Mapping[int, Sequence[float]]],
    ) -> None:
        """The probes' losses against their references, as journalled, with the means of training since the last log
        line; `spreads`: by set and block, how the gates are spread."""
        if not self.enabled:
            return
        self.event("probe", phase=phase, step=step, sets=sets, training=self._training)
        self.show_probes(global_step, sets, spreads)
        self.board.heat_maps(global_step)
        log.info("%s probe at %d  %s", phase, step, in_words(sets))

    def show_probes(
        self,
        global_step: int,
        sets: Readings,
        spreads: Mapping[str, Mapping[int, Sequence[float]]],
    ) -> None:
        """The probes in TensorBoard alone."""
        for name, reading in sets.items():
            self.board.probe(global_step, name, reading.model_dump(exclude_unset=True))
        for name, layers in spreads.items():
            self.board.gates(global_step, name, layers)
            shut = {layer: nearly_shut(spread) for layer, spread in layers.items()}
            self.board.layers(global_step, {f"sparsity_on_{name}": shut})

    def samples(self, phase: str, global_step: int, written: Sequence[Sample]) -> None:
        """Texts that were written from the same prompts as ever: in the journal and, as text, in TensorBoard."""
        if not written:
            return
        self.event("samples", phase=phase, global_step=global_step, texts=written)
        for number, sample in enumerate(written):
            both = f"{sample.prompt} ▸ {sample.text}".replace("\n", "\n    ")
            self.board.text(global_step, f"samples/{number}", f"{phase}:\n\n    {both}")

    def time(self, global_step: int, seconds: Mapping[str, float]) -> None:
        """Return how long something took, by its name."""
        self.board.scalars(global_step, {f"time/{name}": value for name, value in seconds.items()})

    def scalar(self, global_step: int, tag: str, value: float) -> None:
        """A number in TensorBoard."""
        self.board.scalars(global_step, {tag: value})

    def happened(self, global_step: int, kind: str, words: str) -> None:
        """A line in the log, a text in TensorBoard and, for what `MARKS` names, a mark on the probes' charts."""
        if self.enabled:
            log.info(words)
            self.board.text(global_step, f"event/{kind}", words)
            if kind in MARKS:
                self.board.mark(global_step, kind)

    def end(self, bare_base: BareBase) -> None:
        """Every phase is committed, and the base is as it is."""
        self.event("run_end", bare_base=bare_base)
        self.board.finished()

    def close(self) -> None:
        """Flushes TensorBoard and takes the bar down."""
        self.board.close()
        if self._progress is not None:
            self._progress.stop()


class RunningMean:
    """Sums what the steps give, on the device, so that nothing waits for a GPU between log lines."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, terms: Tensor, layers: Tensor) -> None:
        """One step: terms (len(TERMS),), layers (2, layers)."""
        flat = torch.cat([terms, layers.flatten()])
        self._sum = flat if self._sum is None else self._sum + flat
        self._count += 1

    def take(self) -> Tensor | None:
        """Return the mean of this rank's steps since the last call, (len(TERMS) + 2·layers,), or None if there were
        none."""
        mean = None if self._sum is None else self._sum / self._count
        self._sum, self._count = None, 0
        return mean
