"""Keep the patch or roll it back: a pure function of held-out losses, the same on every machine.

Every probe set is compared block by block with earlier losses of the same blocks, so that what makes one block harder
than another cancels, and a rise counts only when its paired t-interval excludes zero.

What `tolerance` is measured from, and why there are two answers:

- *While training*, from the last good entry. A probe that rises by more than its tolerance since then was hurt by the
  window in between; going back to that entry undoes it. A corpus that this phase has learned is protected so too.
- *For an entry to be called good*, from the phase's start. Any good entry may become the phase's commit, so the
  promise about commits, "no probe is more than its tolerance worse than when the phase began", must hold for each:
  `Keep.good` is true only if every probe's mean drift is within its tolerance. No interval softens this: what is
  promised is the number that is printed.

Between the two, a patch may creep up to `max_drift` above the phase's start (as it does before the learning rate has
come down) and training goes on; but nothing is called good there, and the phase can't be committed there. Above
`max_drift` it is rolled back. With `max_drift` equal to the tolerance there is no such margin. Both bounds are for one
phase; a caller who wants one for the whole stream passes the run's first losses as `phase_start`.

A phase that was stopped has used up its rollbacks: its corpus did harm again and again. It ends with the last good
entry only if no probe of that entry is measurably worse than at the phase's start, else with the start: see
`stopped_phase_keeps`. So a scrambled corpus leaves no trace, not even one within tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.floating]


@dataclass(frozen=True)
class ProbeSet:
    """A held-out set; `tolerance` is the rise it may show, in nats per token, above 0."""

    name: str
    tolerance: float

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"probe {self.name!r}: tolerance must be above 0 nats per token (got {self.tolerance})")


@dataclass(frozen=True)
class Comparison:
    """One probe set against the last good entry (`mean_rise`, interval `low` to `high`) and against the phase's start
    (`drift`, interval `drift_low` to `drift_high`), all in nats per token; `loss` and `reference` are means.

    `regressed`: roll back, for `reason`. `within`: fit to be called good. Non-finite losses give NaN.
    """

    name: str
    loss: float
    reference: float
    mean_rise: float
    low: float
    high: float
    drift: float
    drift_low: float
    drift_high: float
    tolerance: float
    regressed: bool
    reason: str

    @property
    def within(self) -> bool:
        """Return whether the mean is at most `tolerance` above the phase's start and nothing regressed."""
        return not self.regressed and self.drift <= self.tolerance

    def as_fields(self) -> dict[str, float]:
        """Return what the journal and an entry's metadata record of it."""
        return {
            "loss": self.loss,
            "reference": self.reference,
            "rise": self.mean_rise,
            "low": self.low,
            "high": self.high,
            "drift": self.drift,
            "tolerance": self.tolerance,
        }


@dataclass(frozen=True)
class Keep:
    """Train on. `good`: record the patch as the last good one; else keep the earlier good entry as the reference."""

    good: bool = True


@dataclass(frozen=True)
class Rollback:
    """Go back to the last good entry and past the window that hurt."""

    reason: str


@dataclass(frozen=True)
class Stop:
    """End the phase, without the current patch: `stopped_phase_keeps` says with which."""

    reason: str


def compare_set(
    name: str,
    losses: Losses,
    reference: Losses,
    phase_start: Losses,
    tolerance: float,
    max_drift: float,
    confidence: float,
) -> Comparison:
    """Compares the mean losses of a probe set's blocks, each array (blocks,) in nats per token, same blocks and order.

    `reference`: of the last good entry; `phase_start`: of the patch the phase began with. `tolerance` and `max_drift`
    in nats per token; `confidence` of the two-sided intervals, in (0, 1). A loss that is not finite is a regression.

    Raises ValueError for shapes that differ or fewer than 2 blocks (one block has no interval), and for a reference
    or phase start that is not finite: no such patch can have been good.
    """
    losses, reference, phase_start = (np.asarray(x, dtype=np.float64) for x in (losses, reference, phase_start))
    if not losses.shape == reference.shape == phase_start.shape or losses.ndim != 1 or losses.size < 2:
        raise ValueError(
            f"probe {name!r}: losses {losses.shape}, reference {reference.shape} and phase start {phase_start.shape} "
            "must have one shape (blocks,) with at least 2 blocks"
        )
    if not (np.isfinite(reference).all() and np.isfinite(phase_start).all()):
        raise ValueError(f"probe {name!r}: the reference and the phase's start must be finite")
    rise, low, high = mean_interval(losses - reference, confidence)
    drift, drift_low, drift_high = mean_interval(losses - phase_start, confidence)
    reason = ""
    if not np.isfinite(losses).all():
        reason = f"{name}: {np.count_nonzero(~np.isfinite(losses))} of {losses.size} block losses are not finite"
    elif rise > tolerance and low > 0:
        reason = (
            f"{name} rose by {rise:.4f} nats per token since the last good entry, above its tolerance of "
            f"{tolerance:g} ({confidence:.0%} interval {low:.4f} to {high:.4f})"
        )
    elif drift > max_drift and drift_low > 0:
        reason = (
            f"{name} is {drift:.4f} nats per token above the phase's start, beyond max_drift of "
            f"{max_drift:g} ({confidence:.0%} interval {drift_low:.4f} to {drift_high:.4f})"
        )
    return Comparison(
        name=name,
        loss=float(losses.mean()),
        reference=float(reference.mean()),
        mean_rise=rise,
        low=low,
        high=high,
        drift=drift,
        drift_low=drift_low,
        drift_high=drift_high,
        tolerance=tolerance,
        regressed=bool(reason),
        reason=reason,
    )


def compare_all(
    sets: Sequence[ProbeSet],
    losses: Mapping[str, Losses],
    reference: Mapping[str, Losses],
    phase_start: Mapping[str, Losses],
    max_drift: float,
    confidence: float,
) -> list[Comparison]:
    """`compare` for every probe set, with arrays (blocks,) by the sets' names. Raises ValueError as it does."""
    return [
        compare_set(s.name, losses[s.name], reference[s.name], phase_start[s.name], s.tolerance, max_drift, confidence)
        for s in sets
    ]


def decide(
    comparisons: Sequence[Comparison], rollbacks_so_far: int, max_rollbacks: int, nonfinite: bool = False
) -> Keep | Rollback | Stop:
    """Keep if nothing regressed; else Rollback while the phase has had fewer than `max_rollbacks`, then Stop.

    `nonfinite`: the training loss or a gradient was not finite on some rank, which is a regression by itself.
    """
    reasons = ["the training loss or a gradient is not finite"] if nonfinite else []
    reasons += [comparison.reason for comparison in comparisons if comparison.regressed]
    if not reasons:
        return Keep(good=all(comparison.within for comparison in comparisons))
    if rollbacks_so_far < max_rollbacks:
        return Rollback("; ".join(reasons))
    return Stop(f"{'; '.join(reasons)}; the phase has used its {max_rollbacks} rollbacks")


def stopped_phase_keeps(last_good: Sequence[Comparison]) -> bool:
    """Return whether a stopped phase ends with its last good entry (whose comparisons these are) or, if false, with the
    patch it began with: no probe's drift since the phase's start may be measurably above zero."""
    return not any(comparison.drift_low > 0 for comparison in last_good)


@lru_cache(maxsize=64)
def student_t_quantile(confidence: float, freedom: int) -> float:
    """Return the t with P(|T| <= t) = `confidence` for Student's T of `freedom` degrees (an integer, at least 1).

    Bisects the closed form of P for integer degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4), in the angle
    atan(t / sqrt(freedom)). Raises ValueError for a confidence outside (0, 1) or a freedom below 1.
    """
    if not 0 < confidence < 1 or freedom < 1:
        raise ValueError(f"confidence must be in (0, 1) and freedom at least 1 (got {confidence}, {freedom})")
    low, high = 0.0, math.pi / 2
    while low < (angle := (low + high) / 2) < high:
        low, high = (angle, high) if _two_sided(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(angle)


def _two_sided(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) * tan(angle))."""
    cosine, odd = math.cos(angle), freedom % 2
    terms = np.arange(2 + odd, freedom - 1, 2, dtype=np.float64)  # each term is the one before by (k - 1) / k * cos²
    series = 1.0 + float(np.cumprod((terms - 1) / terms * cosine**2).sum())
    if not odd:
        return math.sin(angle) * series
    return (angle + (math.sin(angle) * cosine * series if freedom > 1 else 0.0)) * 2 / math.pi


def mean_interval(values: Losses, confidence: float) -> tuple[float, float, float]:
    """Return the mean of the blocks' losses or differences (blocks,), at least 2, and the two ends of its t-interval;
    NaN if any is not finite. Raises ValueError for fewer than 2 blocks, or a confidence outside (0, 1)."""
    if not np.isfinite(values).all():
        return math.nan, math.nan, math.nan
    mean, blocks = float(values.mean()), values.size
    margin = student_t_quantile(confidence, blocks - 1) * float(values.std(ddof=1)) / math.sqrt(blocks)
    return mean, mean - margin, mean + margin
