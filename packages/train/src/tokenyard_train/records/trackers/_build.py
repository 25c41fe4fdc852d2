"""The trackers of a run as one object. A tracker that fails is removed and training continues."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenyard import ConfigError, TokenyardError
from tokenyard.bounded import read_json
from tokenyard_train.config.loggers import Loggers
from tokenyard_train.hide_secrets import hide_secrets
from tokenyard_train.records.trackers._base import Tracker, scalars

_CLASSES = {
    "tensorboard": "tokenyard_train.records.trackers.tensorboard:TensorboardTracker",
    "mlflow": "tokenyard_train.records.trackers.mlflow:MlflowTracker",
    "wandb": "tokenyard_train.records.trackers.wandb:WandbTracker",
}

IDENTITIES = "trackers.json"
"""File in a run's folder: the run's id in each tracker, so that a resumed run keeps its ids."""

log = logging.getLogger("tokenyard")


@dataclass
class RunInfo:
    """The run's data for a tracker's constructor. A tracker adds its id to `identities`."""

    folder: Path
    run_name: str
    config: Mapping[str, Any]
    batch: int  # optimizer steps done already; 0 for a new run
    identities: dict[str, str] = field(default_factory=dict)  # tracker name -> the run's id


class Trackers:
    """Several trackers as one. A tracker that fails is removed, and a warning names it."""

    def __init__(self, trackers: Mapping[str, Tracker]):
        self._trackers = dict(trackers)

    def record(self, record: Mapping[str, Any]) -> None:
        """Log a record of metrics.jsonl to every tracker."""
        if not self._trackers:
            return  # a record may have thousands of numbers
        numbers = scalars(record)
        step = int(record.get("batch", 0))
        self._call(lambda tracker: tracker.log(numbers, step))

    def finish(self, failed: bool) -> None:
        """Close the run in every tracker."""
        self._call(lambda tracker: tracker.finish(failed))

    def _call(self, method: Callable[[Tracker], None]) -> None:
        """Call a method of every tracker, and remove those that fail."""
        for name, tracker in list(self._trackers.items()):
            try:
                method(tracker)
            # A library or a server may raise anything, and metrics.jsonl has the numbers.
            except Exception as error:
                del self._trackers[name]
                log.warning(
                    "loggers.%s failed and is left out from here on: %s: %s",
                    name,
                    type(error).__name__,
                    _reason(error),
                )


def build_trackers(
    config: Loggers, folder: Path, run_name: str, settings: Mapping[str, Any], batch: int
) -> Trackers:
    """Start the trackers that a config names. Raises ConfigError if one cannot be started.

    `settings` is the dumped config; `batch` is the step that the run starts from.
    """
    sections = {
        name: section for name in _CLASSES if (section := getattr(config, name)) is not None
    }
    if not sections:
        return Trackers({})
    run = RunInfo(folder, run_name, settings, batch, _identities(folder) if batch else {})
    trackers = {name: _start(name, options, run) for name, options in sections.items()}
    try:
        (folder / IDENTITIES).write_text(json.dumps(run.identities), encoding="utf-8")
    except OSError as error:
        log.warning("%s; a resumed run will start new runs in its trackers", error)
    return Trackers(trackers)


def check_trackers(config: Loggers) -> None:
    """Raise ConfigError if a tracker's library is missing. Imports none of them."""
    for name in _CLASSES:  # each is also the name of its library and of its extra
        if getattr(config, name) is not None and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"loggers.{name} needs {name}, which is not installed; "
                f'pip install "tokenyard-train[{name}]"'
            )


def _start(name: str, options: Any, run: RunInfo) -> Tracker:
    module, _, cls = _CLASSES[name].partition(":")
    try:
        tracker: Tracker = getattr(importlib.import_module(module), cls)(options, run)
    except TokenyardError:
        raise
    except Exception as error:
        raise ConfigError(
            f"loggers.{name} cannot be started: {type(error).__name__}: {_reason(error)}"
        ) from None
    return tracker


def _reason(error: Exception) -> str:
    return hide_secrets(" ".join(str(error).split()))[:200]


def _identities(folder: Path) -> dict[str, str]:
    """Read the ids of the run; none, with a warning, if the file is damaged."""
    path = folder / IDENTITIES
    if not path.exists():
        return {}
    try:
        ids = read_json(path)
    except ConfigError:
        ids = None
    if isinstance(ids, dict) and all(isinstance(value, str) for value in ids.values()):
        return ids
    log.warning("%s is damaged; the run gets new ids in its trackers", path)
    return {}
