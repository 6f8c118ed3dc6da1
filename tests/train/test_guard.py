"""The guard: harm is seen, noise is not, creep is bounded, and every good entry keeps the promise about commits."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from revpatch.evaluation.guard import (
    Comparison,
    Keep,
    ProbeSet,
    Rollback,
    Stop,
    compare_all,
    compare_set,
    decide,
    stopped_phase_keeps,
    student_t_quantile,
)

TOLERANCE, MAX_DRIFT, CONFIDENCE = 0.03, 0.06, 0.95


def block_losses(seed: int, blocks: int = 64) -> np.ndarray:
    """Losses that differ far more between blocks than any rise that matters."""
    return np.random.default_rng(seed).normal(3.5, 0.6, blocks)


def compared(losses, reference, phase_start=None, tolerance=TOLERANCE, max_drift=MAX_DRIFT) -> Comparison:
    start = reference if phase_start is None else phase_start
    return compare_set("base", losses, reference, start, tolerance, max_drift, CONFIDENCE)


seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds, excess=st.floats(1.05, 100.0), blocks=st.integers(2, 200))
def test_a_constant_rise_above_tolerance_always_regresses(seed, excess, blocks):
    reference = block_losses(seed, blocks)
    found = compared(reference + TOLERANCE * excess, reference, max_drift=1e9)
    assert found.regressed
    assert not found.within
    assert "base rose by" in found.reason
    assert found.low == pytest.approx(found.mean_rise, abs=1e-6)


@given(seed=seeds, share=st.floats(-50.0, 0.95), blocks=st.integers(2, 200))
def test_a_constant_rise_within_tolerance_is_kept_and_good(seed, share, blocks):
    reference = block_losses(seed, blocks)
    found = compared(reference + TOLERANCE * share, reference)
    assert (found.regressed, found.reason, found.within) == (False, "", True)
    assert decide([found], 0, 5) == Keep(good=True)


def test_noise_alone_rarely_regresses():
    """Zero true rise; the noise's mean often exceeds this tiny tolerance, so only the interval holds it back."""
    rng, trials, regressed, above = np.random.default_rng(0), 2000, 0, 0
    for trial in range(trials):
        reference = block_losses(trial, 24)
        found = compared(reference + rng.normal(0, 0.1, 24), reference, tolerance=0.005, max_drift=0.005)
        regressed += found.regressed
        above += found.mean_rise > 0.005
    assert above > 0.3 * trials
    assert 0.01 * trials < regressed < 0.04 * trials  # (1 - 0.95) / 2 in expectation


def test_a_small_rise_is_seen_because_blocks_are_paired():
    """0.05 nats against a spread of 0.6 between blocks: unpaired, an interval of ±0.2 would hide it."""
    reference = block_losses(1)
    noise = np.random.default_rng(2).normal(0, 0.02, reference.size)
    found = compared(reference + 0.05 + noise, reference)
    assert found.regressed
    assert 0.04 < found.low < found.mean_rise < found.high < 0.06
    shuffled = np.random.default_rng(3).permutation(reference + 0.05 + noise)
    assert not compared(shuffled, reference).regressed


@given(seed=seeds, tolerance=st.floats(1e-3, 0.5))
def test_slow_creep_is_caught_by_max_drift(seed, tolerance):
    """Each probe 0.9 of the tolerance above the one before: never a sudden rise, but it ends."""
    start = block_losses(seed)
    verdicts, good, reference = [], [], start
    for probe in range(1, 6):
        losses = start + 0.9 * tolerance * probe
        found = compared(losses, reference, start, tolerance, max_drift=2 * tolerance)
        verdicts.append(found.regressed)
        good.append(found.within)
        reference = losses
    assert verdicts == [False, False, True, True, True]
    assert good == [True, False, False, False, False]
    assert "beyond max_drift" in found.reason


def test_drift_needs_an_interval_that_excludes_zero():
    start = block_losses(4, 8)
    noise = np.array([2.0, -2.0, 1.5, -1.5, 1.0, -1.0, 0.5, 0.3])
    found = compared(start + noise, start + noise, start)
    assert found.drift > MAX_DRIFT
    assert not found.regressed
    assert not found.within, "what is promised about a commit is the mean itself"


@given(seed=seeds, bad=st.sampled_from([math.nan, math.inf, -math.inf]), where=st.integers(0, 63))
def test_a_loss_that_is_not_finite_regresses(seed, bad, where):
    reference = block_losses(seed)
    losses = reference - 1.0
    losses[where] = bad
    found = compared(losses, reference)
    assert found.regressed
    assert not found.within
    assert "1 of 64 block losses are not finite" in found.reason
    assert isinstance(decide([found], 0, 5), Rollback)


def test_what_can_not_be_compared_is_refused():
    whole, short, bad = np.ones(4), np.ones(3), np.array([1.0, math.nan])
    for losses, reference, start in (
        (short, whole, whole),
        (whole, short, whole),
        (whole, whole, short),
        (whole[:1],) * 3,
    ):
        with pytest.raises(ValueError, match="must have one shape"):
            compared(losses, reference, start)
    for reference, start in ((bad, whole[:2]), (whole[:2], bad)):
        with pytest.raises(ValueError, match="must be finite"):
            compared(np.ones(2), reference, start)
    for tolerance in (0.0, math.nan):
        with pytest.raises(ValueError, match="tolerance must be above 0"):
            ProbeSet("base", tolerance)


def test_the_interval_is_the_textbooks():
    """Differences 1, 2, 3, 4: mean 2.5, s = 1.2909944, t(3) = 3.1824463, so 2.5 ± 3.1824463 · 1.2909944 / 2."""
    reference = block_losses(11, 4)
    found = compared(reference + np.array([1.0, 2.0, 3.0, 4.0]), reference)
    assert (found.mean_rise, found.low, found.high) == pytest.approx((2.5, 0.4457397, 4.5542603), abs=1e-6)


def test_verdicts():
    start = block_losses(6)
    fine, crept, hurt = (compared(start + rise, start + min(rise, 0.05), start) for rise in (0.0, 0.05, 0.5))
    assert decide([], 0, 5) == Keep(good=True)
    assert decide([fine], 0, 5) == Keep(good=True)
    assert decide([fine, crept], 0, 5) == Keep(good=False)
    assert decide([fine, hurt], 4, 5) == Rollback(hurt.reason)
    stopped = decide([hurt, fine], 5, 5)
    assert isinstance(stopped, Stop)
    assert hurt.reason in stopped.reason
    assert "its 5 rollbacks" in stopped.reason
    assert isinstance(decide([hurt], 0, 0), Stop)
    verdict = decide([fine], 0, 5, nonfinite=True)
    assert isinstance(verdict, Rollback)
    assert "not finite" in verdict.reason
    assert isinstance(decide([], 5, 5, nonfinite=True), Stop)


def test_every_regression_is_named():
    start = block_losses(7)
    sets = [ProbeSet("base", 0.03), ProbeSet("wikitext", 0.2), ProbeSet("imdb", 0.1)]
    losses = {"base": start + 0.1, "wikitext": start + 0.1, "imdb": start + 0.2}
    reference = dict.fromkeys(losses, start)
    found = compare_all(sets, losses, reference, reference, 0.5, CONFIDENCE)
    assert [(c.name, c.regressed) for c in found] == [("base", True), ("wikitext", False), ("imdb", True)]
    verdict = decide(found, 0, 1)
    assert "base rose" in verdict.reason
    assert "imdb rose" in verdict.reason
    assert "wikitext" not in verdict.reason


def test_a_stopped_phase_keeps_its_last_good_entry_only_if_it_did_no_measurable_harm():
    start = block_losses(8)
    noise = np.random.default_rng(9).normal(0, 0.02, start.size)
    better, same, worse = (compared(start + noise - noise.mean() + rise, start) for rise in (-0.1, 0.0, 0.02))
    assert worse.within
    assert stopped_phase_keeps([better, same])
    assert not stopped_phase_keeps([better, worse])


@pytest.mark.parametrize(
    ("confidence", "freedom", "quantile"),
    [
        (0.95, 1, 12.7062047),
        (0.90, 7, 1.8945786),
        (0.99, 5, 4.0321430),
        (0.99, 1000, 2.5807547),
        (0.95, 10**5, 1.9599877),
    ],
)
def test_student_t_against_the_tables(confidence, freedom, quantile):
    assert student_t_quantile(confidence, freedom) == pytest.approx(quantile, abs=2e-7)
