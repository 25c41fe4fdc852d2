"""Config sections for trackers, with the key names of LLM Foundry and Composer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tokenyard_models.strict_config import Strict
from tokenyard_train.config import foundry
from tokenyard_train.data.paths import LocalPath
from tokenyard_train.data.schema import Section


class TensorboardLogger(Section):
    """Write event files for TensorBoard."""

    ignored: ClassVar[frozenset[str]] = foundry.LOGGER

    log_dir: LocalPath | None = (
        None  # parent of a folder named run_name; None: save_folder/tensorboard
    )
    flush_interval: int = Field(100, ge=1)  # records between writes to disk


class MlflowLogger(Section):
    """Log to a run of MLflow."""

    ignored: ClassVar[frozenset[str]] = foundry.LOGGER

    experiment_name: str | None = None  # name of the experiment; None: tokenyard
    run_name: str | None = None  # name of the run; None: the config's run_name
    tracking_uri: str | None = None  # folder or server; None: mlruns beside save_folder
    tags: dict[str, str] = {}  # tags of the run


class WandbLogger(Section):
    """Log to a run of Weights & Biases."""

    ignored: ClassVar[frozenset[str]] = foundry.LOGGER

    project: str | None = None  # project of the run
    group: str | None = None  # group of runs
    name: str | None = None  # name of the run; None: the config's run_name
    entity: str | None = None  # user or team
    tags: list[str] = []  # tags of the run
    mode: Literal["offline", "online"] = "offline"  # offline writes files only


class Loggers(Strict):
    """Trackers for metrics. metrics.jsonl is always written."""

    ignored: ClassVar[frozenset[str]] = foundry.LOGGERS

    tensorboard: TensorboardLogger | None = None
    mlflow: MlflowLogger | None = None
    wandb: WandbLogger | None = None
