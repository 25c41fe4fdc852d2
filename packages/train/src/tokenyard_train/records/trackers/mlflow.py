"""MLflow, on a server or in a local folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from tokenyard_train.config.loggers import MlflowLogger
from tokenyard_train.optional import needs
from tokenyard_train.records.trackers._build import Place

_LONGEST = 500  # characters of a parameter's value


class MlflowTracker:
    """Logs into an MLflow run; a resumed one goes on in the same run, and logs no step twice.

    `tracking_uri` is a server, a database or a folder (``file:``), by default ``mlruns`` beside the run's folder.
    """

    def __init__(self, options: MlflowLogger, place: Place):
        mlflow = needs("mlflow", "loggers.mlflow", "tokenyard-train[mlflow]")
        uri = options.tracking_uri or (place.folder.parent / "mlruns").absolute().as_uri()
        if "://" not in uri or uri.startswith("file:"):
            os.environ.setdefault(
                "MLFLOW_ALLOW_FILE_STORE", "true"
            )  # a folder needs no server; MLflow asks to say so
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._run = place.identities.get("mlflow") or self._create(options, place)
        self._logged = self._last_step() if place.batch else 0
        place.identities["mlflow"] = self._run

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log the numbers in one call, unless the run had them before it was resumed."""
        if step and step <= self._logged:
            return
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def finish(self, failed: bool) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")

    def _create(self, options: MlflowLogger, place: Place) -> str:
        name = options.experiment_name or "tokenyard"
        found = self._client.get_experiment_by_name(name)
        experiment = (
            found.experiment_id if found is not None else self._client.create_experiment(name)
        )
        run = self._client.create_run(
            experiment, run_name=options.run_name or place.run_name, tags=options.tags
        )
        params = [self._entities.Param(key, value) for key, value in _parameters(place.config)]
        for first in range(0, len(params), 100):  # as many as MLflow takes at once
            self._client.log_batch(run.info.run_id, params=params[first : first + 100])
        return str(run.info.run_id)

    def _last_step(self) -> int:
        history = self._client.get_metric_history(self._run, "train/loss")
        return max((metric.step for metric in history), default=0)


def _parameters(config: Mapping[str, Any], where: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _parameters(value, f"{where}{key}.")
        elif value is not None:
            found.append((f"{where}{key}", str(value)[:_LONGEST]))
    return found
