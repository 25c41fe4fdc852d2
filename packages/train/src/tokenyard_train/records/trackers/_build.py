"""The trackers of a run as one: what fails is left out, and training goes on."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenyard import ConfigError, TokenyardError
from tokenyard_train.config.loggers import Loggers
from tokenyard_train.records.trackers._base import Tracker, scalars

_CLASSES = {
    "tensorboard": "tokenyard_train.records.trackers.tensorboard:TensorboardTracker",
    "mlflow": "tokenyard_train.records.trackers.mlflow:MlflowTracker",
    "wandb": "tokenyard_train.records.trackers.wandb:WandbTracker",
}

IDENTITIES = "trackers.json"
"""In a run's folder: the ids under which trackers know the run, so that a resumed one goes on there."""

log = logging.getLogger("tokenyard")


@dataclass
class Place:
    """What a tracker is told of the run: its folder, name and config, and where it goes on."""

    folder: Path
    run_name: str
    config: Mapping[str, Any]
    batch: int  # optimizer steps done already; 0 for a new run
    identities: dict[str, str] = field(default_factory=dict)


class Trackers:
    """Several trackers as one. One that fails in the middle of a run is named in a warning and left out."""

    def __init__(self, trackers: Mapping[str, Tracker]):
        self._trackers = dict(trackers)

    def record(self, record: Mapping[str, Any]) -> None:
        """Show a record of metrics.jsonl."""
        numbers, step = scalars(record), int(record.get("batch", 0))
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.log(numbers, step))  # type: ignore[misc]

    def finish(self, failed: bool) -> None:
        """End the run everywhere."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.finish(failed))  # type: ignore[misc]

    def _try(self, name: str, call: Any) -> None:
        try:
            call()
        except (
            Exception
        ) as error:  # whatever a library or a server raises, metrics.jsonl has the numbers
            del self._trackers[name]
            reason = " ".join(str(error).split())[:200]
            log.warning(
                "loggers.%s failed and is left out from here on: %s: %s",
                name,
                type(error).__name__,
                reason,
            )


def build_trackers(
    config: Loggers, folder: Path, run_name: str, settings: Mapping[str, Any], batch: int
) -> Trackers:
    """Start the trackers that a config asks for. Raises ConfigError for one that cannot be had."""
    asked = {name: options for name in _CLASSES if (options := getattr(config, name)) is not None}
    if not asked:
        return Trackers({})
    place = Place(folder, run_name, settings, batch, _identities(folder) if batch else {})
    trackers = {name: _start(name, options, place) for name, options in asked.items()}
    (folder / IDENTITIES).write_text(json.dumps(place.identities), encoding="utf-8")
    return Trackers(trackers)


def _start(name: str, options: Any, place: Place) -> Tracker:
    module, _, cls = _CLASSES[name].partition(":")
    try:
        tracker: Tracker = getattr(importlib.import_module(module), cls)(options, place)
    except TokenyardError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"loggers.{name} cannot be started: {type(error).__name__}: {reason}"
        ) from None
    return tracker


def _identities(folder: Path) -> dict[str, str]:
    path = folder / IDENTITIES
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
