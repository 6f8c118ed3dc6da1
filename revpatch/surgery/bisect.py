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
from revpatch.ledger.ledger import Ledger, ledger_of
from revpatch.patch.patched_model import Patch
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
        report: gets each evaluation as it is made.

    Raises:
        ValueError, OSError: the run has no commit; or as `probe`.
    """
    ledger = Ledger(ledger_of(run), readonly=True)
    entries = ledger.entries()
    commits = [entry for entry in entries if entry.kind == "commit"]
    if not commits:
        raise ValueError(f"{run} has no commit yet, so there is nothing to search")
    start = next((entry for entry in entries if entry.kind == "start" and entry.seq < commits[0].seq), None)
    states: list[EntryWritten | None] = [start, *commits]  # None is the base alone
    names = [BASE if state is None else state.name for state in states]
    subject = Subject.of(str(ledger.directory / names[-1]), base)
    held_out = HeldOut(subject, sets_of([shards], blocks))
    (config,) = held_out.sets
    found = Bisection(config.shards, held_out.blocks[config.name], above)
    seen: dict[int, Losses] = {}

    def measure(patch: Patch | None, state: str, without: list[int]) -> Losses:
        losses = held_out.measure(patch)[config.name].losses
        loss = float(losses.mean())
        above = None if found.above is None else not loss <= found.above
        found.evaluations.append(Evaluation(len(found.evaluations) + 1, state, without, loss, above))
        report(found.evaluations[-1])
        return losses

    def loss_of(index: int) -> float:
        if index not in seen:
            state = states[index]
            patch = None if state is None else subject.patch_of(of_base(ledger.read(state.name)))
            seen[index] = measure(patch, names[index], [])
        return float(seen[index].mean())

    last = len(commits)
    if found.above is None:
        middle = (loss_of(last) + loss_of(0)) / 2
        rise, low, _ = interval(seen[last] - seen[0], confidence)
        if (rise if low is None else low) <= 0:  # not what is not a number: that is as bad as can be
            found.note = (
                f"the newest commit is not measurably worse than {names[0]} ({rise:+.4f} nats per token): "
                "there is nothing to find; name a limit with --above to search all the same"
            )
            found.evaluations_to_commit = len(found.evaluations)
            return found
        found.above = middle if math.isfinite(middle) else sys.float_info.max
    crossing = first_above(loss_of, len(states), found.above)
    found.evaluations_to_commit = len(found.evaluations)
    if crossing is None:
        high = not seen[last].mean() <= found.above
        what = f"{names[0]} is above the limit already" if high else "the newest commit is not above the limit"
        found.note = f"{what} of {found.above:.4f} nats per token: there is nothing to find"
        return found
    worse = crossing.worse
    found.commit, found.before = names[worse], names[worse - 1]
    found.loss, found.loss_before = loss_of(worse), loss_of(worse - 1)
    entry = of_base(ledger.read(found.commit))

    def loss_without(layers: frozenset[int]) -> float:
        patch = subject.patch_from(entry, bypassed(entry.tensors, layers))
        return float(measure(patch, names[worse], sorted(layers)).mean())

    found.layers = fewest_to_blame(loss_without, layers_with_sidecars(entry.tensors), crossing.above)
    if found.layers is None:
        found.note = "with all sidecars bypassed the loss is still above the limit: it is the base's own"
    return found
