"""Weights & Biases and MLflow, through accelerate's trackers; off unless `monitoring.trackers` names them.

They get every number that TensorBoard gets, under the same tags, and the config. Where they send it is their own
affair: WANDB_MODE=offline, MLFLOW_TRACKING_URI and the like are theirs to read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from revpatch.config import ConfigError

log = logging.getLogger("revpatch")

PROJECT = "revpatch"


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
    left out from then on: a server that is away is no reason to stop training.
    """

    def __init__(self, names: Sequence[str], run: Path) -> None:
        self._step, self._values = 0, dict[str, float]()
        self._trackers: list[Any] = []
        for name in names:
            tracker = _tracker(name, run)
            self._trackers.append(tracker)
        self._each("start")

    def configure(self, values: Mapping[str, bool | int | float | str]) -> None:
        """The run's hyperparameters."""
        self._each("store_init_configuration", dict(values))

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

    def _each(self, method: str, *args: Any, **kwargs: Any) -> None:
        for tracker in list(self._trackers):
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


def _tracker(name: str, run: Path) -> Any:
    tracking: Any = import_module("accelerate.tracking")
    tracking.logger = _PlainLogger(logging.getLogger(tracking.__name__), {})
    options = {
        "wandb": {"run_name": PROJECT, "name": run.name, "dir": str(run)},
        "mlflow": {"experiment_name": PROJECT, "run_name": run.name},
    }
    tracker = tracking.LOGGER_TYPE_TO_CLASS[name](**options[name])
    tracker.main_process_only = False  # only rank 0 has trackers, and it needs none of accelerate's process state
    return tracker
