"""Searches that ask as few questions as they can: the first state that is worse, and the fewest parts to blame.

Each question is one evaluation, seconds to minutes of a model's time; nothing is asked twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Crossing:
    """`worse` is the first state found above the limit, and the one before it is not. Both were evaluated."""

    worse: int
    above: float


def first_above(loss: Callable[[int], float], states: int, above: float | None) -> Crossing | None:
    """A state whose loss is above a limit while that of the state before it is not, by bisection.

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
