"""Register the trained model in MLflow, as a Hugging Face folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenyard import Model, TokenyardError
from tokenyard_cli.console import print_line
from tokenyard_models.hf import format_to_write
from tokenyard_train.config.loggers import Loggers, MlflowLogger
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import Data
from tokenyard_train.distributed import is_rank0
from tokenyard_train.engine.build_model import meta_model
from tokenyard_train.engine.callback import Callback
from tokenyard_train.engine.state import Run
from tokenyard_train.engine.table_versions import table_versions

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


class Registration(Callback):
    """Registers the last checkpoint with the versions of its data and its held-out score."""

    def __init__(self, options: MlflowLogger):
        self.options = options

    def check(self, config: TrainConfig, model: Model, data: Data) -> None:
        """Raise WeightsError if the model cannot be written as a Hugging Face folder."""
        format_to_write(meta_model(config))  # `model` may have the class of a strategy

    def end(self, run: Run) -> None:
        """Convert the last checkpoint, upload it and register it. Rank 0 does this alone."""
        if not is_rank0():
            return
        from tokenyard_train.records.trackers.mlflow import register_model

        checkpoint = run.setup.folder / f"ba{run.batch}"
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "model")
            _convert(checkpoint, target)
            uri = register_model(self.options, run.setup.folder, target, _tags(run))
        print_line(run.setup.console, f"registered as {uri}")


def build_registration(loggers: Loggers) -> list[Callback]:
    """Return the callback that registers the model, if the config asks for it."""
    options = loggers.mlflow
    return [] if options is None or options.register is None else [Registration(options)]


def _tags(run: Run) -> dict[str, str]:
    """Return the versions and digests of the data, and the held-out score."""
    tags = {f"digest.{key}": digest for key, digest in run.setup.identity.items()}
    tags |= {f"data.{key}": table for key, table in table_versions(run.setup.config).items()}
    scores = [r["bits_per_byte"] for r in run.metrics.read() if r["kind"] == "eval"]
    if scores:
        tags["eval.bits_per_byte"] = str(scores[-1])
    return tags | {"batch": str(run.batch), "run_name": run.setup.config.run_name}


def _convert(checkpoint: Path, target: Path) -> None:
    """Convert a checkpoint in a process of its own, which belongs to no ranks and uses no GPU."""
    environment = {k: v for k, v in os.environ.items() if k not in _RANK_VARIABLES}
    command = [sys.executable, "-m", "tokenyard_train", "convert", str(checkpoint), str(target)]
    result = subprocess.run(
        command, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    if result.returncode:
        raise TokenyardError(result.stderr.strip() or f"convert ended with {result.returncode}")
