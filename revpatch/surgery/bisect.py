"""Which commit made a held-out text worse, and then which of its layers' sidecars: `revpatch ledger bisect`.

Each question is one evaluation, seconds to minutes of a model's time; nothing is asked twice.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from revpatch.evaluation.losses import HeldOut, Losses, Subject, interval, of_base, sets_of
from revpatch.ledger.events import EntryWritten
from revpatch.ledger.ledger import Ledger, PatchFile, ledger_of
from revpatch.surgery.combine import bypassed, layers_with_sidecars


@dataclass(frozen=True)
class Crossing:
    """`worse` is the first state found above the limit, and the one before it is not. Both were evaluated."""

    worse: int
    above: float


def first_above(loss: Callable[[int], float], states: int, above: float | None) -> Crossing | None:
    """Return a state whose loss is above a limit while that of the state before it is not, by bisection.

    The last and the first state are asked first, so over n states it takes 2 + ⌈log2(n − 1)⌉ questions. If the losses
    only rise there is one such state; if they go up and down there may be several, and it is one of them.

    Args:
        loss: the loss of state 0 to states − 1. One that is not a number counts as above.
        states: how many there are, at least 2.
        above: the limit; None is the middle between the first and the last state's losses.

    Returns:
        None if the last state is not above the limit, or the first one is already.
    """
    assert states >= 2
    last, first = loss(states - 1), loss(0)
    limit = (first + last) / 2 if above is None else above
    if last <= limit or not first <= limit:
        return None
    fine, worse = 0, states - 1
    while worse - fine > 1:
        middle = (fine + worse) // 2
        if loss(middle) <= limit:
            fine = middle
        else:
            worse = middle
    return Crossing(worse, limit)


def fewest_to_blame(loss: Callable[[frozenset[int]], float], parts: Sequence[int], above: float) -> list[int] | None:
    """Parts without which the loss is not above the limit, and each of which is needed for that.

    Grows the group from the front until the loss is not above the limit: the part that made the difference is to
    blame, by bisection. With it out, the same is asked of the parts before it, until no more are needed. At the end
    each is put back once, as what was found first may be needless beside what was found later. About k·(2 + log2(n))
    questions for k of n parts.

    Args:
        loss: the loss without these parts; that without none is above the limit.
        parts: the parts.
        above: the limit.

    Returns:
        The parts in ascending order; None if the loss is above the limit without all of them.
    """
    asked: dict[frozenset[int], bool] = {frozenset(): False}

    def fine(without: Sequence[int]) -> bool:
        group = frozenset(without)
        if group not in asked:
            asked[group] = loss(group) <= above
        return asked[group]

    found: list[int] = []
    candidates = list(parts)
    if not fine(candidates):
        return None
    while not fine(found):
        low, high = 0, len(candidates)  # not enough, and enough
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fine(found + candidates[:middle]) else (middle, high)
        found.append(candidates[high - 1])
        candidates = candidates[: high - 1]
    while (spare := next((part for part in found if fine([each for each in found if each != part])), None)) is not None:
        found.remove(spare)
    return sorted(found)


BASE = "the base alone"


@dataclass(frozen=True)
class Evaluation:
    """One measurement; `bypassed` are the blocks whose sidecars were out of the way."""

    number: int
    state: str
    bypassed: list[int]
    loss: float
    above: bool | None
    """Whether it is above the limit; None while there is no limit yet."""


@dataclass
class Bisection:
    """What was found. `commit` is None if the held-out text did not get worse, and `note` says so; `layers` is None
    if the loss is above the limit even with all sidecars bypassed."""

    shards: str
    blocks: int
    above: float | None = None
    commit: str | None = None
    before: str | None = None
    loss: float | None = None
    loss_before: float | None = None
    layers: list[int] | None = None
    note: str = ""
    evaluations_to_commit: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)

    def as_fields(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def bisect(
    run: Path,
    shards: str,
    above: float | None = None,
    base: str | None = None,
    blocks: int | None = None,
    confidence: float = 0.95,
    report: Callable[[Evaluation], None] = lambda _: None,
) -> Bisection:
    """Finds the commit that raised the loss on `shards` above a limit, and the sidecars that did it.

    Args:
        run: the run's folder.
        shards: held-out token shards.
        above: the limit, in nats per token; None is halfway from the loss at the run's start to that of the newest
            commit, and then nothing is searched unless the rise between them is measurable. Where the newest's loss is
            not finite, every loss that is lies below the limit.
        base, blocks: as in `probe`.
        confidence: of the interval that makes the rise measurable.
        report: is told of each evaluation as it is made.

    Raises:
        ValueError, OSError: the run has no commit; or as `probe`.
    """
    ledger = Ledger(ledger_of(run), readonly=True)
    states = _states(ledger, run)
    newest = states[-1]
    assert newest is not None
    subject = Subject.of(str(ledger.directory / newest.name), base)
    search = _Search(subject, ledger, states, HeldOut(subject, sets_of([shards], blocks)), report)
    search.found.above = above
    crossing = search.commits(above, confidence)
    search.found.evaluations_to_commit = len(search.found.evaluations)
    if crossing is not None:
        search.layers(crossing)
    return search.found


def _states(ledger: Ledger, run: Path) -> list[EntryWritten | None]:
    """Return what the run began with, None for the base alone, and every commit, oldest first."""
    entries = ledger.entries()
    commits: list[EntryWritten | None] = [entry for entry in entries if entry.kind == "commit"]
    if not commits:
        raise ValueError(f"{run} has no commit yet, so there is nothing to search")
    start = next((entry for entry in entries if entry.kind == "start" and entry.seq < commits[0].seq), None)  # type: ignore[union-attr]
    return [start, *commits]


class _Search:
    """The states of a run, each evaluated once at most and reported as it is."""

    def __init__(
        self,
        subject: Subject,
        ledger: Ledger,
        states: list[EntryWritten | None],
        held_out: HeldOut,
        report: Callable[[Evaluation], None],
    ) -> None:
        self.subject, self.ledger, self.states = subject, ledger, states
        self.held_out, self.report = held_out, report
        (config,) = held_out.sets
        self.name = config.name
        self.found = Bisection(config.shards, held_out.blocks[config.name])
        self.seen: dict[int, Losses] = {}

    def commits(self, above: float | None, confidence: float) -> Crossing | None:
        """Return the first commit above the limit."""
        last = len(self.states) - 1
        if above is None:
            self._loss(last), self._loss(0)
            rise, low, _ = interval(self.seen[last] - self.seen[0], confidence)
            if (rise if low is None else low) <= 0:  # not what is not a number: that is as bad as can be
                self.found.note = (
                    f"the newest commit is not measurably worse than {self._name(0)} ({rise:+.4f} nats per token): "
                    "there is nothing to find; name a limit with --above to search all the same"
                )
                return None
            middle = float((self.seen[last].mean() + self.seen[0].mean()) / 2)
            self.found.above = above = middle if math.isfinite(middle) else sys.float_info.max
        crossing = first_above(self._loss, last + 1, above)
        if crossing is None:
            high = not self.seen[last].mean() <= above
            what = f"{self._name(0)} is above the limit already" if high else "the newest commit is not above the limit"
            self.found.note = f"{what} of {above:.4f} nats per token: there is nothing to find"
            return None
        worse = crossing.worse
        self.found.commit, self.found.before = self._name(worse), self._name(worse - 1)
        self.found.loss, self.found.loss_before = (float(self.seen[i].mean()) for i in (worse, worse - 1))
        return crossing

    def layers(self, crossing: Crossing) -> None:
        """The sidecars of that commit without which the loss is not above the limit."""
        entry = self._entry(crossing.worse)
        assert entry is not None

        def loss(without: frozenset[int]) -> float:
            patch = self.subject.patch_from(entry, bypassed(entry.tensors, without))
            losses = self.held_out.measure(patch)[self.name].losses
            return self._put_down(self._name(crossing.worse), losses, sorted(without))

        layers = layers_with_sidecars(entry.tensors)
        self.found.layers = fewest_to_blame(loss, layers, crossing.above)
        if self.found.layers is None:
            self.found.note = "with all sidecars bypassed the loss is still above the limit: it is the base's own"

    def _loss(self, index: int) -> float:
        if index not in self.seen:
            entry = self._entry(index)
            patch = None if entry is None else self.subject.patch_of(entry)
            self.seen[index] = self.held_out.measure(patch)[self.name].losses
            self._put_down(self._name(index), self.seen[index], [])
        return float(self.seen[index].mean())

    def _put_down(self, state: str, losses: Losses, without: list[int]) -> float:
        loss, limit = float(losses.mean()), self.found.above
        above = None if limit is None else not loss <= limit
        evaluation = Evaluation(len(self.found.evaluations) + 1, state, without, loss, above)
        self.found.evaluations.append(evaluation)
        self.report(evaluation)
        return loss

    def _entry(self, index: int) -> PatchFile | None:
        state = self.states[index]
        return None if state is None else of_base(self.ledger.read(state.name))

    def _name(self, index: int) -> str:
        state = self.states[index]
        return BASE if state is None else state.name
