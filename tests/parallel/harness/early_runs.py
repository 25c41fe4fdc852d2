"""Runs over ranks that launch a step before the numbers of the last one, as with a graph."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch.distributed as dist
from rich.console import Console

from tokenyard_train.callbacks import Callback
from tokenyard_train.commands.train import train
from tokenyard_train.config import read_config
from tokenyard_train.engine import steps
from tokenyard_train.engine.setup import Setup
from tokenyard_train.engine.signals import Stopped
from tokenyard_train.engine.state import Run
from tokenyard_train.records import plots
from tokenyard_train.records.metrics import Metrics

Settings = dict[str, Any]


class Reads(Callback):
    """Acts after each step."""

    def batch_end(self, run: Run, record: Mapping[str, Any]) -> None:
        """Do nothing."""


def stopped(settings: Settings, event: str) -> str:
    """Train until a signal to rank 0 in the second step; return how the run ended on this rank.

    The event is on rank 0 alone: a callback that acts after each step, or a launch that fails.
    """
    first = dist.get_rank() == 0
    callbacks = [Reads()] if first and event == "callback" else []
    begin, write = steps.begin_step, Metrics.write

    def begin_or_fail(setup: Setup, batch: int) -> Any:
        if first and event == "failure" and batch == 2:
            raise RuntimeError("out of luck")
        return begin(setup, batch)

    def write_and_signal(metrics: Metrics, record: dict[str, Any]) -> None:
        write(metrics, record)
        if record["kind"] == "train" and record["batch"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    figures = patch.multiple(plots, loss_curve=Mock(), expert_heatmap=Mock())
    replays = patch.object(Setup, "replays", True)
    launches = patch.object(steps, "begin_step", begin_or_fail)
    signals = patch.object(Metrics, "write", write_and_signal)
    try:
        with figures, replays, launches, signals:
            train(read_config(settings), Console(quiet=True), callbacks)
    except Stopped as end:
        return str(end)
    except RuntimeError as error:
        if not first:
            raise
        # As in a run: the process ends, and the other rank notices
        Path(settings["save_folder"], "error.txt").write_text(str(error))
        os._exit(1)
    return "not stopped"
