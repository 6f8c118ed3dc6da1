"""Trackers: what a service's client gets through accelerate, from clients that only write it down."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from toy import Toy

from revpatch.config import ConfigError
from revpatch.ledger.journal import Journal
from revpatch.monitoring.tensorboard import Board
from revpatch.monitoring.trackers import Trackers, check_trackers
from revpatch.train.run import train_run

WANDB = """
import json, pathlib
__version__ = "0.30.0"
class Config:
    def update(self, values, **options): record("config", values)
class Run:
    def log(self, values, step=None, **options): record("log", {"step": step, **values})
    def finish(self): record("finish", {})
config = Config()
def record(what, values):
    with open(pathlib.Path(__file__).with_name("recorded.jsonl"), "a") as file:
        file.write(json.dumps([what, values]) + "\\n")
def init(**options):
    record("init", options)
    return Run()
"""

MLFLOW = """
import json, pathlib, types
limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
utils = types.SimpleNamespace(validation=limits)
def record(what, values):
    with open(pathlib.Path(__file__).with_name("recorded.jsonl"), "a") as file:
        file.write(json.dumps([what, values]) + "\\n")
def search_experiments(filter_string): return []
def create_experiment(name, **_): return name
def start_run(experiment_id, run_name, run_id, **_):
    record("start", {"experiment": experiment_id, "name": run_name, "run_id": run_id})
    return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "chosen by MLflow"))
def log_params(values): record("config", values)
def log_metrics(values, step): record("log", {"step": step, **values})
def end_run(): record("finish", {})
"""


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return, when called, what two clients that only write it down were given."""
    site = tmp_path / "site"
    site.mkdir()
    for name, source in (("wandb", WANDB), ("mlflow", MLFLOW)):
        (site / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(site))
    yield lambda: [json.loads(line) for line in (site / "recorded.jsonl").read_text().splitlines()]
    for name in ("wandb", "mlflow"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("service", "begin", "id_key", "known"),
    [
        ("wandb", "init", "id", {"project": "revpatch", "name": "mine", "resume": "allow"}),
        ("mlflow", "start", "run_id", {"experiment": "revpatch", "name": "mine"}),
    ],
)
def test_a_tracker_gets_what_the_board_gets_and_a_resumed_run_is_the_same_run_to_it(
    service: str, begin: str, id_key: str, known: dict[str, Any], recorded: Any, tmp_path: Path
) -> None:
    check_trackers([service])
    for ranks in (1, 2):
        with Board(tmp_path, enabled=False, trackers=Trackers([service], tmp_path / "mine")) as board:
            board.introduce({}, {"ranks": ranks}, [])
            board.scalars(10, {"loss/lm": 2.0})
            board.layers(10, {"gate": {0: 0.5, 3: 0.7}})
            board.scalars(20, {"loss/lm": 1.0})
    Trackers([service], tmp_path / "other").close()
    first, again, other = (values for kind, values in recorded() if kind == begin)
    kept = json.loads((tmp_path / "mine/trackers.json").read_text())[service]
    assert {key: first[key] for key in known} == known and first.get("dir") in (None, str(tmp_path / "mine"))
    assert first[id_key] == (kept if service == "wandb" else None)  # MLflow chooses its own
    assert again[id_key] == kept != other[id_key]
    logged = [
        {"step": 10, "loss/lm": 2.0, "gate/layer_00": 0.5, "gate/layer_03": 0.7, "gate/mean": 0.6},
        {"step": 20, "loss/lm": 1.0},
    ]
    assert [values for kind, values in recorded() if kind == "log"] == 2 * logged, "a step at a time"
    assert [values for kind, values in recorded() if kind == "finish"] == 3 * [{}]
    # MLflow refuses another value of what it has.
    ranks_seen = [values["ranks"] for kind, values in recorded() if kind == "config"]
    assert ranks_seen == {"wandb": [1, 2], "mlflow": [1]}[service]


def test_a_service_that_fails_does_not_stop_the_run(
    recorded: Any, caplog: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    trackers = Trackers(["wandb"], tmp_path)
    monkeypatch.setattr(sys.modules["wandb"].Run, "log", lambda *_, **__: 1 / 0)
    ours = logging.getLogger("revpatch")
    monkeypatch.setattr(ours, "propagate", True)
    monkeypatch.setattr(ours, "handlers", [])  # pytest's own too, which it gives to loggers that do not propagate
    with caplog.at_level(logging.WARNING, "revpatch"):
        trackers.log(1, {"a": 1.0})
        trackers.flush()
        trackers.log(2, {"a": 1.0})
        trackers.close()
    assert [r.getMessage() for r in caplog.records] == [
        "tracker wandb failed and is left out from here on: division by zero"
    ]
    (tmp_path / "trackers.json").write_text("[1")
    with pytest.raises(ValueError, match=r"trackers.json: expected the trackers' ids .* remove it"):
        Trackers(["wandb"], tmp_path)


def test_a_run_without_its_tracker_is_refused_before_anything_starts(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow/run-1").mkdir(parents=True)  # a folder of the name is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(ConfigError, match="names mlflow, and that package is not installed: pip install mlflow"):
        train_run(toy.config(tmp_path, monitoring={"trackers": ["mlflow"]}))
    assert not (tmp_path / "run").exists()


def test_a_run_sends_its_tracker_the_probes_of_its_journal(
    recorded: Any, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("revpatch.train.startup.peak_of", lambda *_: 2.0)  # as of a GPU that is known
    config = toy.config(
        tmp_path,
        monitoring={"trackers": ["wandb"], "samples": {"max_new_tokens": 5}},
        phases=[{"name": "first", "shards": str(toy.shards("first")), "steps": 6}],
        probes={"sets": [{"name": "base", "shards": str(toy.shards("base_probe")), "max_blocks": 4}]},
    )
    assert not train_run(config).interrupted
    events = Journal(tmp_path / "run/ledger/journal.jsonl", readonly=True).records()
    (probe,) = (event for event in events if event["event"] == "probe")
    logged = {values["step"]: values for kind, values in recorded() if kind == "log"}
    assert logged[6]["probe/base/loss"] == pytest.approx(probe["sets"]["base"]["loss"])
    assert logged[6]["loss/lm"] == pytest.approx(probe["training"]["lm"])
    assert 0 < logged[6]["speed/share_of_peak"] < 1
    assert 1e7 < logged[6]["memory/peak_gb"] * 1e9 < 1e11
    assert logged[6]["wire/bytes_a_step"] == 0, "one rank reduces with nobody"
    samples = [event for event in events if event["event"] == "samples"]
    assert [event["phase"] for event in samples] == ["base", "first"]
    assert samples[0]["texts"][0]["prompt"] == samples[1]["texts"][0]["prompt"] != ""
