"""What a config says of trackers, with LLM Foundry's and Composer's key names."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tokenyard_models.schema import Strict
from tokenyard_train.config import foundry


class TensorboardLogger(Strict):
    """Event files for TensorBoard."""

    ignored: ClassVar[frozenset[str]] = foundry.LOGGER

    log_dir: str | None = (
        None  # None: tensorboard in save_folder; else a folder in it is named after the run
    )
    flush_interval: int = Field(100, ge=1)  # records


class MlflowLogger(Strict):
    """A run of MLflow."""

    ignored: ClassVar[frozenset[str]] = foundry.LOGGER

    experiment_name: str | None = None  # None: tokenyard
    run_name: str | None = None  # None: the config's
    tracking_uri: str | None = None  # None: mlruns beside save_folder
    tags: dict[str, str] = {}  # of the run


class WandbLogger(Strict):
    """A run of Weights & Biases."""

    ignored: ClassVar[frozenset[str]] = foundry.LOGGER

    project: str | None = None  # where the run is filed
    group: str | None = None  # of runs
    name: str | None = None  # None: the config's run_name
    entity: str | None = None  # user or team
    tags: list[str] = []  # of the run
    mode: Literal["offline", "online"] = "offline"  # offline writes files only


class Loggers(Strict):
    """Where metrics go besides metrics.jsonl, which is always written."""

    ignored: ClassVar[frozenset[str]] = foundry.LOGGERS

    tensorboard: TensorboardLogger | None = None
    mlflow: MlflowLogger | None = None
    wandb: WandbLogger | None = None
