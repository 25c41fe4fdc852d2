"""Config sections for trackers, with the key names of LLM Foundry and Composer."""

from __future__ import annotations

import re
import warnings
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

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


def _check_uri(uri: str) -> str:
    user = uri.partition("://")[2].partition("/")[0].rpartition("@")[0]
    if ":" in user:
        raise ValueError("it holds a password; give that by MLFLOW_TRACKING_PASSWORD")
    return uri


def _check_model_name(name: str) -> str:
    if not re.fullmatch(r"[^/:@]+", name):
        raise ValueError("give a name without /, : and @")
    return name


with warnings.catch_warnings():
    # pydantic's base class has a method of this name, which no section calls
    warnings.filterwarnings("ignore", message='Field name "register"')

    class MlflowLogger(Section):
        """Log to a run of MLflow."""

        ignored: ClassVar[frozenset[str]] = foundry.LOGGER

        experiment_name: str | None = (
            None  # name of the experiment; None: MLFLOW_EXPERIMENT_NAME, or tokenyard
        )
        run_name: str | None = None  # name of the run; None: the config's run_name
        tracking_uri: Annotated[str, AfterValidator(_check_uri)] | None = (
            None  # folder or server; None: MLFLOW_TRACKING_URI, or mlruns beside save_folder
        )
        tags: dict[str, str] = {}  # tags of the run
        per_expert: bool = False  # log the load of each expert as a metric, not as a picture only
        register: Annotated[str, AfterValidator(_check_model_name)] | None = (
            None  # name under which the trained model is registered
        )


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
