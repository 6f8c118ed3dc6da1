"""Weights & Biases and MLflow, through accelerate's trackers; off unless `monitoring.trackers` names them.

They get every number that TensorBoard gets, under the same tags, and the config. Where they send it is their own
affair: WANDB_MODE=offline, MLFLOW_TRACKING_URI and the like are theirs to read. A run that goes on is the same run to
them: their ids of it are kept in its folder.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from revpatch.config import ConfigError
from revpatch.durable import write_atomically

log = logging.getLogger("revpatch")

PROJECT = "revpatch"
IDS_NAME = "trackers.json"


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError if the package of a tracker is not installed."""
    for name in names:
        spec = find_spec(name)
        # Without an origin it is a mere folder of that name, such as the one that W&B itself writes.
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"monitoring.trackers names {name}, and that package is not installed: pip install {name}, or leave "
                "it out"
            )


class Trackers:
    """The trackers that a config names, for a run in a folder.

    What belongs to one step goes out at once, when the next step's numbers come. One that fails is named in the log and
    left out from then on: a server that is away is no reason to stop training. The services' ids of the run are in
    `run`/trackers.json, so that they resume with it; without the file they begin another.

    Raises ValueError if that file is no such thing.
    """

    def __init__(self, names: Sequence[str], run: Path) -> None:
        self._step, self._values = 0, dict[str, float]()
        self._trackers: list[Any] = []
        ids = _ids_of(run)
        self._known = frozenset(ids)
        if "wandb" in names:
            ids.setdefault("wandb", secrets.token_hex(8))
        for name in names:
            self._trackers.append(_tracker(name, run, ids.get(name)))
        self._each("start")
        ids |= {each.name: each.active_run.info.run_id for each in self._trackers if each.name == "mlflow"}
        if ids.keys() != self._known:
            run.mkdir(parents=True, exist_ok=True)
            write_atomically(run / IDS_NAME, json.dumps(ids).encode())

    def configure(self, values: Mapping[str, bool | int | float | str]) -> None:
        """The run's hyperparameters; MLflow, which refuses others for a run that it has, is told them once."""
        told = {"mlflow"} & self._known
        self._each("store_init_configuration", dict(values), but=told)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by tag."""
        if step != self._step:
            self.flush()
            self._step = step
        self._values.update(values)

    def flush(self) -> None:
        """Sends what is held back."""
        values, self._values = self._values, {}
        if values:
            self._each("log", values, step=self._step)

    def close(self) -> None:
        """Sends the rest, and ends the trackers' runs."""
        self.flush()
        self._each("finish")
        self._trackers = []

    def _each(self, method: str, *args: Any, but: Collection[str] = (), **kwargs: Any) -> None:
        for tracker in [each for each in self._trackers if each.name not in but]:
            try:
                getattr(tracker, method)(*args, **kwargs)
            except Exception as error:  # whatever a service's client raises
                log.warning("tracker %s failed and is left out from here on: %s", tracker.name, error)
                self._trackers.remove(tracker)


class _PlainLogger(logging.LoggerAdapter):  # type: ignore[type-arg]  # takes no argument in Python 3.10
    """In place of accelerate's own, which refuses every word in a process that it has not set up, as with DeepSpeed."""

    def process(self, msg: Any, kwargs: Any) -> Any:
        kept = {key: value for key, value in kwargs.items() if key not in ("main_process_only", "in_order")}
        return msg, kept

    def warning_once(self, msg: str) -> None:
        self.warning(msg)


def _ids_of(run: Path) -> dict[str, str]:
    """Return what each service calls this run, as far as one has been told of it."""
    file = run / IDS_NAME
    try:
        ids = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        ids = None
    if not isinstance(ids, dict) or not all(isinstance(value, str) for value in ids.values()):
        raise ValueError(
            f"{file}: expected the trackers' ids of this run as JSON, found something else: remove it, and the "
            "trackers begin with another run"
        )
    return ids


def _tracker(name: str, run: Path, known_as: str | None) -> Any:
    tracking: Any = import_module("accelerate.tracking")
    tracking.logger = _PlainLogger(logging.getLogger(tracking.__name__), {})
    options = {
        "wandb": {"run_name": PROJECT, "name": run.name, "dir": str(run), "id": known_as, "resume": "allow"},
        "mlflow": {"experiment_name": PROJECT, "run_name": run.name, "run_id": known_as},
    }
    tracker = tracking.LOGGER_TYPE_TO_CLASS[name](**options[name])
    tracker.main_process_only = False  # only rank 0 has trackers, and it needs none of accelerate's process state
    return tracker
