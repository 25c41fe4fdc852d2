"""MLflow tracker, for a server or a local folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from tokenyard_train.config.loggers import MlflowLogger
from tokenyard_train.optional import require
from tokenyard_train.records.trackers._build import RunInfo

_PARAM_CHARACTERS = 500  # longer values are cut
_PARAMS_PER_CALL = 100  # MLflow's limit


class MlflowTracker:
    """Logs to an MLflow run. A resumed run continues in the same MLflow run and logs no step twice.

    `tracking_uri` is a server, a database or a folder (``file:``). The default is ``mlruns`` beside
    the run's folder.
    """

    def __init__(self, options: MlflowLogger, run: RunInfo):
        mlflow = require("mlflow", "loggers.mlflow", "tokenyard-train[mlflow]")
        uri = options.tracking_uri or (run.folder.parent / "mlruns").absolute().as_uri()
        if "://" not in uri or uri.startswith("file:"):
            # MLflow refuses a folder without this variable.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        if uri.startswith("http"):
            # MLflow's own defaults retry for minutes, at each record of a server that is gone.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._run = run.identities.get("mlflow") or self._create(options, run)
        self._logged_step = self._last_step() if run.batch else 0
        run.identities["mlflow"] = self._run

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log the numbers in one call, unless they were logged before the run was resumed."""
        if step and step <= self._logged_step:
            return
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def finish(self, failed: bool) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")

    def _create(self, options: MlflowLogger, run: RunInfo) -> str:
        """Create the MLflow run with the config as its parameters; return its id."""
        name = options.experiment_name or "tokenyard"
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            experiment_id = self._client.create_experiment(name)
        else:
            experiment_id = experiment.experiment_id
        created = self._client.create_run(
            experiment_id, run_name=options.run_name or run.run_name, tags=options.tags
        )
        run_id = str(created.info.run_id)
        params = [self._entities.Param(key, value) for key, value in _parameters(run.config)]
        for first in range(0, len(params), _PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[first : first + _PARAMS_PER_CALL])
        return run_id

    def _last_step(self) -> int:
        history = self._client.get_metric_history(self._run, "train/loss")
        return max((metric.step for metric in history), default=0)


def _parameters(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return a nested config as pairs of a dotted key and a string; keys set to None are absent."""
    parameters: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            parameters += _parameters(value, f"{prefix}{key}.")
        elif value is not None:
            parameters.append((f"{prefix}{key}", str(value)[:_PARAM_CHARACTERS]))
    return parameters
