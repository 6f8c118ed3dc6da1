"""The guard's trials: what a journal says of the guard, what is keyed, and figures that are right."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def a_bench() -> Any:
    """A kind that hurts and a clean one, both on bundled shards, and bundled text in the place of the base's own."""
    from guard_trial import Bench, Kind

    demo = ROOT / "shards/demo"
    kinds = (
        Kind("bad", f"{demo}/scrambled", hurts=True, replays=False, rate=3.0),
        Kind("good", f"{demo}/jargon", hurts=False),
    )
    return Bench(kinds, (f"{demo}/sotu", f"{demo}/sotu_probe"), ROOT / "data/none")


def a_set(drift: float | str, **more: Any) -> dict[str, Any]:
    """A guarded set as the journal has it."""
    return {"rise": drift, "low": drift, "high": drift, "drift": drift, "tolerance": 0.03, "guarded": True, **more}


def a_journal(drifts: dict[int, float | str], back: list[int], kept: float) -> list[dict[str, Any]]:
    """A run that was probed at these steps, rolled back at some of them, and committed with this drift."""
    events: list[dict[str, Any]] = [{"event": "phase_start", "phase": "new"}]
    for step, drift in drifts.items():
        sets = {"own_text": a_set(drift), "new": a_set(9.0, guarded=False)}
        events.append({"event": "probe", "step": step, "sets": sets})
        if step in back:
            events.append({"event": "rollback", "step": step, "reason": f"own_text rose by {drift}"})
    sets = {"own_text": a_set(kept), "new": a_set(9.0, guarded=False)}
    return [*events, {"event": "commit", "step": max(drifts), "sets": sets}]


def a_trial(kind: str, seed: int, journal: list[dict[str, Any]], guarded: bool = True) -> dict[str, Any]:
    """A made-up finished trial."""
    from guard_trial import outcome

    key = {"kind": kind, "seed": seed, "guarded": guarded}
    return {"key": key, "name": f"{kind} seed={seed}", "seconds": 8.0, **outcome(journal)}


def figures(results: list[dict[str, Any]]) -> dict[str, Any]:
    """By name."""
    from guard_trial import figures_of

    return {row.name: row for row in figures_of(a_bench().kinds, results)}


RUNS = [
    a_journal({20: 0.9, 40: 0.01}, [20], 0.01),
    a_journal({20: "NaN", 40: 0.02}, [20], 0.02),
]


def test_a_journal_tells_probes_rollbacks_and_commits() -> None:
    from guard_trial import outcome

    found = outcome(RUNS[1])
    assert found["rollbacks"] == [{"step": 20, "reason": "own_text rose by NaN"}]
    assert [probe["sets"]["own_text"]["drift"] for probe in found["probes"]] == [None, 0.02]
    assert found["commits"] == [{"step": 40, "sets": {"own_text": {"drift": 0.02, "tolerance": 0.03}}}]
    json.dumps(found, allow_nan=False)


def test_a_regression_that_is_missed_and_a_clean_run_that_is_rolled_back_are_counted_and_named() -> None:
    from guard_trial import surprises

    clean = a_journal({20: 0.01, 40: 0.02}, [], 0.02)
    good = [a_trial("bad", seed, RUNS[seed % 2]) for seed in range(99)] + [a_trial("good", 0, clean)]
    rows = figures(good)
    assert all(row.holds for name, row in rows.items() if "control" not in name and "unguarded" not in name)
    assert rows["every guarded probe within its tolerance at every commit"].measured == 1.0
    assert surprises(a_bench().kinds, good) == []

    missed = a_trial("bad", 99, a_journal({20: 0.5, 40: 0.6}, [], 0.6))
    disturbed = a_trial("good", 1, a_journal({20: 0.05, 40: 0.01}, [20], 0.01))
    rows = figures([*good, missed, disturbed])
    assert rows["runs with a real regression that were rolled back"].measured == 0.99
    assert rows["runs with a real regression that were rolled back"].holds
    assert rows["clean runs that were rolled back"].measured == 0.5
    assert not rows["clean runs that were rolled back"].holds
    assert not rows["every guarded probe within its tolerance at every commit"].holds
    assert rows["largest rise of a guarded set at a commit"].measured == pytest.approx(20.0)
    assert (rows["bad: rolled back"].measured, rows["good: rolled back"].measured) == ("99 of 100", "1 of 2")
    assert surprises(a_bench().kinds, [*good, missed, disturbed]) == [
        "bad seed=99: not rolled back (drift +0.5000 at 20, +0.6000 at 40)",
        "good seed=1: rolled back at 20: own_text rose by 0.05 (drift +0.0500 at 20, +0.0100 at 40)",
    ]
    again = figures([*good, missed, a_trial("bad", 100, a_journal({20: 0.5}, [], 0.01))])
    assert not again["runs with a real regression that were rolled back"].holds


@pytest.mark.parametrize(
    ("kind", "drifts", "holds"),
    [
        ("bad", {20: 0.02, 40: 0.04}, True),
        ("bad", {20: 0.9, 40: 0.02}, False),
        ("bad", {20: 0.1, 40: "NaN"}, True),
        ("good", {20: 0.01, 40: 0.02}, True),
        ("good", {20: 0.05, 40: 0.01}, False),
    ],
)
def test_a_control_shows_whether_a_kind_is_what_it_is_called(
    kind: str, drifts: dict[int, float | str], holds: bool
) -> None:
    rows = figures([a_trial(kind, 0, a_journal(drifts, [], 0.0), guarded=False)])
    control = next(row for name, row in rows.items() if name.startswith(f"{kind}: own text's"))
    assert control.holds is holds
    assert rows[f"{kind}: rolled back"].measured == "0 of 0", "a control is no trial"


def test_without_trials_nothing_holds() -> None:
    rows = figures([])
    assert not any(row.holds for row in rows.values() if row.asked)


@pytest.mark.parametrize(
    ("hits", "of", "share"),
    [(0, 9, 0.0), (9, 10, 0.60584), (10, 10, 0.74113), (299, 299, 0.99003), (2000, 2000, 0.9985)],
)
def test_the_least_share_is_clopper_and_pearsons(hits: int, of: int, share: float) -> None:
    from guard_trial import at_least

    assert at_least(hits, of) == pytest.approx(share, abs=1e-5)


def test_trials_keep_the_guards_defaults_and_a_control_has_no_guard(tmp_path: Path) -> None:
    from guard_trial import OWN_TEXT, TOLERANCE, Trial

    from revpatch.config import Config, RollbackConfig

    bench = a_bench()
    bad, good = bench.kinds
    configs = {
        (kind, guarded): Config.model_validate(bench.config(Trial(kind, 0, guarded), tmp_path))
        for kind in bench.kinds
        for guarded in (True, False)
    }
    assert configs[bad, True].rollback == configs[good, True].rollback == RollbackConfig()
    assert [(probe.name, probe.tolerance) for probe in configs[bad, True].probes.sets] == [(OWN_TEXT, TOLERANCE)]
    assert configs[good, True].replays_own_text, "so that the trainer guards the same set by itself"
    assert configs[bad, True].batch.replay_blocks == 0
    for kind in bench.kinds:
        control = configs[kind, False]
        assert control.rollback.max_drift == control.probes.sets[0].tolerance == 1e6


def test_all_that_decides_is_in_the_key_and_no_path() -> None:
    from compare_cells import digest_of
    from guard_trial import Trial

    bench = a_bench()
    bad, good = bench.kinds
    trials = [
        Trial(bad, 0),
        Trial(bad, 1),
        Trial(bad, 0, guarded=False),
        Trial(replace(bad, rate=4.0), 0),
        Trial(replace(bad, shards=good.shards), 0),
        Trial(replace(bad, replays=True), 0),
        Trial(good, 0),
    ]
    keys = [bench.key(trial) for trial in trials]
    assert len(set(map(digest_of, keys))) == len(trials)
    assert str(ROOT) not in json.dumps(keys)
    assert keys[0]["settings"]["rollback"]["max_drift"] == 0.06


def test_what_was_run_otherwise_is_not_counted(tmp_path: Path) -> None:
    from compare_cells import Store
    from guard_trial import Trial

    bench, store = a_bench(), Store(tmp_path / "guard.jsonl")
    key = bench.key(Trial(bench.kinds[0], 5))
    for one in (key, {**key, "recipe": 0}, {**key, "kind": "gone"}):
        store.add({"key": one})
    assert [result["key"] for result in bench.results(store)] == [key]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only=("], "unterminated"),
        (["--language=nowhere.jsonl"], "language: expected a file of documents, found no nowhere.jsonl"),
    ],
)
def test_a_call_that_can_not_be_made_is_refused_in_a_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import guard_trial

    with pytest.raises(SystemExit) as raised:
        guard_trial.main([*words, f"--folder={tmp_path}", f"--store={tmp_path}/guard.jsonl"])
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_trial_is_rolled_back_and_is_not_run_twice(tmp_path: Path) -> None:
    store, file = tmp_path / "guard.jsonl", tmp_path / "figures.json"
    command = [sys.executable, str(TOOLS / "guard_trial.py"), "--times=1", "--only=^scrambled seed=0$"]
    command += [f"--store={store}", f"--json={file}", f"--folder={tmp_path}/built"]
    for said in ("1 of 1, scrambled seed=0", "no --language"):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert said in done.stderr
    assert len(store.read_text().splitlines()) == 1
    rows = {figure["name"]: figure for figure in json.loads(file.read_text())["figures"]}
    assert rows["scrambled: rolled back"]["measured"] == "1 of 1"
    assert rows["every guarded probe within its tolerance at every commit"]["holds"]
