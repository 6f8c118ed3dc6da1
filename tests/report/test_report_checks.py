"""The checklist: what passes, what fails, and what is not judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from past_events import reading

from revpatch.ledger.events import ProbeReading, Readings
from revpatch.report import Check, checklist
from revpatch.report.history import PhaseHistory, RollbackHistory, RunHistory, matrix_of


def a_set(loss: float, before: float, guarded: bool, gate: float, norm: float) -> ProbeReading:
    blocks = [loss - 0.1, loss, loss + 0.1]
    return reading(loss, before, guarded=guarded, gate=gate, patch_norm=norm, block_losses=blocks)


def change(sets: Readings, name: str, **changes: Any) -> None:
    sets[name] = sets[name].model_copy(update=changes)


def healthy() -> RunHistory:
    """Two phases: one that learns and is rolled back once, one that is given up."""
    start = {"old": a_set(3.0, 3.0, True, 0.5, 0.0), "new": a_set(6.0, 6.0, False, 0.5, 0.0)}
    start["noise"] = a_set(9.0, 9.0, False, 0.5, 0.0)
    learned = {"old": a_set(3.01, 3.0, True, 0.1, 1.0), "new": a_set(4.0, 6.0, False, 0.9, 5.0)}
    learned["noise"] = a_set(9.0, 9.0, False, 0.9, 5.0)
    kept = {
        name: found.model_copy(update={"guarded": name != "noise", "drift": 0.0}) for name, found in learned.items()
    }
    worse = {"old": a_set(3.5, 3.0, True, 0.8, 6.0)}
    good = {"old": a_set(3.02, 3.0, True, 0.1, 1.0)}
    first = PhaseHistory(1, "new", 0, 100, start, commit=learned, commit_step=100)
    first.rollbacks = [RollbackHistory(60, "good.safetensors", "old rose", worse, good, "probe")]
    second = PhaseHistory(2, "noise", 100, 50, kept, commit=kept, commit_step=0)
    second.rollbacks = [RollbackHistory(120, "start.safetensors", "old rose", worse, kept, "run_end")]
    taught = {"old": 0, "new": 1, "noise": 2}
    return RunHistory(Path("run"), [first, second], taught, dict.fromkeys(taught, 0.03), ended=True)


def checks_of(run: RunHistory) -> dict[str, Check]:
    return {check.name: check for check in checklist(run, matrix_of(run))}


def test_a_healthy_run_passes_and_a_phase_that_was_given_up_does_not_count_as_learning() -> None:
    found = checks_of(healthy())
    assert list(found) == ["plasticity", "stability", "locality", "patch magnitude", "ledger usefulness"]
    assert all(check.passed for check in found.values())
    assert [row.passed for row in found["plasticity"].rows] == [True, None]
    assert "given up after 1 rollbacks" in found["plasticity"].rows[1].figure
    assert found["plasticity"].figure.startswith("+2.0000 (")
    assert "worst: old +0.0100 of 0.03 at new" in found["stability"].figure
    assert "old 3.5000 back to 3.0200" in found["ledger usefulness"].rows[0].figure


def restored_badly(run: RunHistory) -> None:
    change(run.phases[0].rollbacks[0].restored, "old", loss=3.4, drift=0.4)


def stopped_after_rollback(run: RunHistory) -> None:
    run.phases[1].rollbacks[0] = replace(run.phases[1].rollbacks[0], went_on="")


@pytest.mark.parametrize(
    ("harm", "name", "figure"),
    [
        (
            lambda run: change(run.phases[0].commit, "new", loss=5.99, block_losses=[5, 6, 6.97]),
            "plasticity",
            "+0.0100 (",
        ),
        (lambda run: setattr(run.phases[1], "commit_step", 50), "plasticity", "+0.0000 ("),  # not rolled back
        (lambda run: change(run.phases[0].commit, "old", drift=0.031), "stability", "worst: old +0.0310 of 0.03"),
        (lambda run: change(run.phases[0].commit, "old", gate=0.85), "locality", "mean gate 0.90 on new, 0.85 on old"),
        (lambda run: change(run.phases[0].commit, "old", patch_norm=2.6), "patch magnitude", "5 on new, 2.6 on old"),
        (restored_badly, "ledger usefulness", "2 rollbacks; new at step 60: restored: old 3.5000 back to 3.4000"),
        (stopped_after_rollback, "ledger usefulness", "2 rollbacks; noise at step 20: went on: no step was probed"),
    ],
)
def test_each_check_fails_alone_and_says_first_what_fails(harm: Any, name: str, figure: str) -> None:
    run = healthy()
    harm(run)
    (failed,) = [check for check in checks_of(run).values() if check.passed is False]
    assert (failed.name, failed.figure[: len(figure)]) == (name, figure)


def test_nothing_is_judged_that_was_not_measured_and_a_run_that_was_given_up_learned_nothing() -> None:
    run = healthy()
    run.phases[0].rollbacks, run.phases[1].rollbacks, run.phases[0].commit_step = [], [], 0
    assert checks_of(run)["plasticity"].passed is False
    del run.taught_by["old"]
    found = checks_of(run)
    assert [found[name].passed for name in ("locality", "patch magnitude", "ledger usefulness")] == [None] * 3
