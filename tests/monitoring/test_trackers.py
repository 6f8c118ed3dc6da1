"""Trackers: what a service's client is told through accelerate, by a client that only writes it down."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import Runs, RunServer
from toy import Toy

from revpatch.config import ConfigError
from revpatch.config.file import load_config
from revpatch.ledger.journal import Journal
from revpatch.monitoring.tensorboard import Board
from revpatch.monitoring.trackers import Trackers, check_trackers
from revpatch.train.run import train_run

WANDB = """
import json, pathlib
__version__ = "0.30.0"
class Config:
    def update(self, values, **options): tell("config", values)
class Run:
    def log(self, values, step=None, **options): tell("log", {"step": step, **values})
    def finish(self): tell("finish", {})
config = Config()
def tell(what, values):
    with open(pathlib.Path(__file__).with_name("told.jsonl"), "a") as file:
        file.write(json.dumps([what, values]) + "\\n")
def init(**options):
    tell("init", options)
    return Run()
"""

MLFLOW = """
import json, pathlib, types
limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
utils = types.SimpleNamespace(validation=limits)
def tell(what, values):
    with open(pathlib.Path(__file__).with_name("told.jsonl"), "a") as file:
        file.write(json.dumps([what, values]) + "\\n")
def search_experiments(filter_string): return []
def create_experiment(name, **_): return name
def start_run(experiment_id, run_name, run_id, **_):
    tell("start", {"experiment": experiment_id, "name": run_name, "run_id": run_id})
    return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "chosen by MLflow"))
def log_params(values): tell("config", values)
def log_metrics(values, step): tell("log", {"step": step, **values})
def end_run(): tell("finish", {})
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Clients that write down what they are told; gives what they have been told."""
    site = tmp_path / "site"
    site.mkdir()
    clients = {"wandb": WANDB, "mlflow": MLFLOW}
    for name, source in clients.items():
        (site / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(site))
    yield lambda: [json.loads(line) for line in (site / "told.jsonl").read_text().splitlines()]
    for name in clients:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("service", "begins"),
    [
        ("wandb", ["init", {"project": "revpatch", "name": "mine"}]),
        ("mlflow", ["start", {"experiment": "revpatch", "name": "mine", "run_id": None}]),
    ],
)
def test_a_tracker_is_told_what_the_board_is_told_a_step_at_a_time(
    service: str, begins: list[Any], told: Any, tmp_path: Path
) -> None:
    check_trackers([service])
    run = tmp_path / "mine"
    with Board(tmp_path, enabled=False, trackers=Trackers([service], run)) as board:
        board.introduce({}, {"optimizer.lr": 0.1}, [])
        board.scalars(10, {"loss/lm": 2.0})
        board.layers(10, {"gate": {0: 0.5, 3: 0.7}})
        board.scalars(20, {"loss/lm": 1.0})
    first, *others = told()
    where = {key: first[1].pop(key, None) for key in ("dir", "id", "resume")}
    assert first == begins
    assert where["dir"] in (None, str(run))
    assert others == [
        ["config", {"optimizer.lr": 0.1}],
        ["log", {"step": 10, "loss/lm": 2.0, "gate/layer_00": 0.5, "gate/layer_03": 0.7, "gate/mean": 0.6}],
        ["log", {"step": 20, "loss/lm": 1.0}],
        ["finish", {}],
    ]


@pytest.mark.parametrize(("service", "begins", "name"), [("wandb", "init", "id"), ("mlflow", "start", "run_id")])
def test_a_run_that_goes_on_is_the_same_run_to_its_trackers(
    service: str, begins: str, name: str, told: Any, tmp_path: Path
) -> None:
    for step in (10, 20):
        with Board(tmp_path, enabled=False, trackers=Trackers([service], tmp_path / "mine")) as board:
            board.introduce({}, {"ranks": step}, [])
            board.scalars(step, {"loss/lm": 2.0})
    Trackers([service], tmp_path / "other").close()
    first, again, other = (values for what, values in told() if what == begins)
    kept = json.loads((tmp_path / "mine/trackers.json").read_text())[service]
    assert again[name] == kept != other[name]
    assert {"wandb": [kept] * 2, "mlflow": [None, kept]}[service] == [first[name], again[name]]
    # MLflow refuses another value of what it was told once.
    ranks = [values["ranks"] for what, values in told() if what == "config"]
    assert ranks == {"wandb": [10, 20], "mlflow": [10]}[service]
    assert [again.get("resume")] == {"wandb": ["allow"], "mlflow": [None]}[service]


def test_a_file_of_ids_that_is_none_is_refused(told: Any, tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text("[1")
    with pytest.raises(ValueError, match=r"trackers.json: expected the trackers' ids .* remove it"):
        Trackers(["wandb"], tmp_path)


def test_a_service_that_fails_does_not_stop_the_run(told: Any, caplog: Any, monkeypatch: Any, tmp_path: Path) -> None:
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


def test_a_run_without_its_tracker_is_refused_before_anything_starts(
    toy: Toy, tmp_path: Path, server: RunServer
) -> None:
    with pytest.raises(ConfigError, match="names mlflow, and that package is not installed: pip install mlflow"):
        check_trackers(["mlflow"])
    runs = Runs(server, toy.config_file(tmp_path, monitoring={"trackers": ["mlflow"]}), tmp_path)
    assert runs.run("refused", world=1) == [2]
    assert "pip install mlflow" in runs.log("refused").read_text()
    assert not runs.path("refused").exists()


def test_a_folder_of_the_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb/run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="that package is not installed: pip install wandb"):
        check_trackers(["wandb"])


def test_a_run_tells_its_tracker_the_probes_of_its_journal(
    told: Any, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("revpatch.train.startup.peak_of", lambda *_: 2.0)  # as of a GPU that is known
    config = toy.config_file(
        tmp_path,
        monitoring={"trackers": ["wandb"], "samples": {"max_new_tokens": 5}},
        phases=[{"name": "first", "shards": str(toy.shards("first")), "steps": 6}],
        probes={"sets": [{"name": "base", "shards": str(toy.shards("base_probe")), "max_blocks": 4}]},
    )
    assert not train_run(load_config(config)).interrupted
    events = Journal(tmp_path / "run/ledger/journal.jsonl", readonly=True).records()
    (probe,) = (event for event in events if event["event"] == "probe")
    logged = {values["step"]: values for what, values in told() if what == "log"}
    assert logged[6]["probe/base/loss"] == pytest.approx(probe["sets"]["base"]["loss"])
    assert logged[6]["loss/lm"] == pytest.approx(probe["training"]["lm"])
    assert 0 < logged[6]["speed/share_of_peak"] < 1
    assert 1e7 < logged[6]["memory/peak_gb"] * 1e9 < 1e11
    assert logged[6]["wire/bytes_a_step"] == 0, "one rank has nobody to tell"
    samples = [event for event in events if event["event"] == "samples"]
    assert [event["phase"] for event in samples] == ["base", "first"]
    assert len(samples[0]["texts"]) == 1
    assert samples[0]["texts"][0]["prompt"] == samples[1]["texts"][0]["prompt"] != ""
