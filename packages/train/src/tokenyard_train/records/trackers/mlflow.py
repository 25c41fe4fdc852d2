"""MLflow tracker, for a server or a local folder, and MLflow's registry of models."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tokenyard import ConfigError
from tokenyard.bounded import read_json
from tokenyard_train.config.loggers import MlflowLogger
from tokenyard_train.hide_secrets import hide_secrets
from tokenyard_train.optional import require
from tokenyard_train.records.environment import git_commit, versions
from tokenyard_train.records.trackers._build import IDENTITIES, RunInfo

_PARAM_CHARACTERS = 500  # longer values are cut
_PARAMS_PER_CALL = 100  # MLflow's limits
_METRICS_PER_CALL = 1000
_PICTURES = ("loss.png", "experts.png")
_PER_EXPERT = "train/load/"


class MlflowTracker:
    """Logs to an MLflow run. A resumed run continues in the same MLflow run and logs no step twice.

    The run has the config as parameters and as config.yaml, versions and git commit as tags, and
    the pictures as artifacts. Where the config names no server, experiment or run, MLflow's
    environment variables do.
    """

    def __init__(self, options: MlflowLogger, run: RunInfo):
        mlflow = require("mlflow", "loggers.mlflow", "tokenyard-train[mlflow]")
        self._entities = mlflow.entities
        self._client = open_client(options, run.folder)
        self._folder = run.folder
        self._per_expert = options.per_expert
        known = run.identities.get("mlflow")
        self._run = known or os.environ.get("MLFLOW_RUN_ID") or self._create(options, run)
        if known is None:
            self._describe(options, run)
        self._logged_step = self._last_step() if run.batch else 0
        run.identities["mlflow"] = self._run

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log the numbers, unless they were logged before the run was resumed.

        The load of each expert is left out without `per_expert`: a picture shows it.
        """
        if step and step <= self._logged_step:
            return
        now = int(time.time() * 1000)
        metrics = [
            self._entities.Metric(name, value, now, step)
            for name, value in numbers.items()
            if self._per_expert or not name.startswith(_PER_EXPERT)
        ]
        for first in range(0, len(metrics), _METRICS_PER_CALL):
            self._client.log_batch(self._run, metrics=metrics[first : first + _METRICS_PER_CALL])

    def finish(self, failed: bool) -> None:
        """Log the pictures of a finished run, and mark the run as finished or failed."""
        for name in _PICTURES:
            if not failed and (self._folder / name).is_file():
                self._client.log_artifact(self._run, str(self._folder / name))
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")

    def _create(self, options: MlflowLogger, run: RunInfo) -> str:
        """Create the MLflow run; return its id."""
        experiment = options.experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID") if experiment is None else None
        if experiment_id is None:
            experiment_id = self._experiment_id(experiment or "tokenyard")
        created = self._client.create_run(experiment_id, run_name=options.run_name or run.run_name)
        return str(created.info.run_id)

    def _experiment_id(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            return str(self._client.create_experiment(name))
        return str(experiment.experiment_id)

    def _describe(self, options: MlflowLogger, run: RunInfo) -> None:
        """Log the config, the versions, the git commit and the tags of the options."""
        tags = {f"version.{name}": version for name, version in versions().items()}
        commit = git_commit()
        if commit is not None:
            tags["mlflow.source.git.commit"] = commit
        listed = [self._entities.RunTag(*pair) for pair in (tags | options.tags).items()]
        self._client.log_batch(self._run, tags=listed)
        params = [self._entities.Param(key, value) for key, value in _parameters(run.config)]
        for first in range(0, len(params), _PARAMS_PER_CALL):
            self._client.log_batch(self._run, params=params[first : first + _PARAMS_PER_CALL])
        text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        self._client.log_text(self._run, text, "config.yaml")

    def _last_step(self) -> int:
        history = self._client.get_metric_history(self._run, "train/loss")
        return max((metric.step for metric in history), default=0)


def open_client(options: MlflowLogger, folder: Path) -> Any:
    """Return an MLflow client for the server or folder of a run in `folder`.

    It is `tracking_uri`, or the environment's MLFLOW_TRACKING_URI, or ``mlruns`` beside the run.
    """
    mlflow = require("mlflow", "loggers.mlflow", "tokenyard-train[mlflow]")
    uri = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    uri = uri or (folder.parent / "mlruns").absolute().as_uri()
    _set_defaults(uri)
    return mlflow.MlflowClient(tracking_uri=uri)


def register_model(
    options: MlflowLogger, run_folder: Path, model: Path, tags: Mapping[str, str]
) -> str:
    """Upload a folder to the MLflow run of a run's folder, and register it.

    Returns its URI, ``models:/NAME/VERSION``.
    """
    mlflow = require("mlflow", "loggers.mlflow", "tokenyard-train[mlflow]")
    client = open_client(options, run_folder)
    run_id = read_json(run_folder / IDENTITIES)["mlflow"]
    described = mlflow.models.Model(
        run_id=run_id, flavors={"tokenyard": {"format": "huggingface"}}, metadata=dict(tags)
    )
    described.save(str(model / "MLmodel"))
    client.log_artifacts(run_id, str(model), "model")
    name = str(options.register)
    try:
        client.create_registered_model(name)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with _environment_of(client.tracking_uri):
        made = client.create_model_version(name, f"runs:/{run_id}/model", run_id, tags=dict(tags))
    return f"models:/{name}/{made.version}"


def download_model(uri: str, folder: Path) -> Path:
    """Download a registered model, such as ``models:/NAME/VERSION``; return its folder.

    Raises ConfigError if MLFLOW_TRACKING_URI is not set, or if the model cannot be downloaded.
    """
    mlflow = require("mlflow", uri, "tokenyard-train[mlflow]")
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if not server:
        raise ConfigError(
            f"{uri} names a model of MLflow's registry; set MLFLOW_TRACKING_URI to its server or "
            "folder, such as file:runs/mlruns"
        )
    _set_defaults(server)
    try:
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
    except Exception as error:  # errors come from MLflow and from each storage
        reason = hide_secrets(" ".join(str(error).split()))[:200]
        raise ConfigError(
            f"{uri} cannot be downloaded from {hide_secrets(server)}: {reason}"
        ) from None


@contextmanager
def _environment_of(uri: str) -> Iterator[None]:
    """Context: MLFLOW_TRACKING_URI is `uri`.

    MLflow's registry in a folder reads it, and makes a database where it is missing.
    """
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


def _set_defaults(uri: str) -> None:
    """Set MLflow's variables that the user has not set."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if "://" not in uri or uri.startswith("file:"):
        # MLflow refuses a folder without this variable.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    if uri.startswith("http"):
        # MLflow's own defaults retry for minutes, at each record of a server that is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def _parameters(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return a nested config as pairs of a dotted key and a string; keys set to None are absent."""
    parameters: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            parameters += _parameters(value, f"{prefix}{key}.")
        elif value is not None:
            parameters.append((f"{prefix}{key}", str(value)[:_PARAM_CHARACTERS]))
    return parameters
