"""Runs of `tokenyard train` with a fault on one rank: a bad number, a signal, a full disk."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

from harness.layout_runs import LossRecorder, Settings, digest, loaded, train_with
from tokenyard_train.checkpoint import CheckpointError, dcp
from tokenyard_train.engine.nonfinite import NonFiniteError
from tokenyard_train.engine.signals import Stopped
from tokenyard_train.engine.state import Run


class BadNumber(NamedTuple):
    """A non-finite number in the step after `batch` steps, on one rank."""

    rank: int
    batch: int
    target: str  # "loss", or the gradient of "norm" (the last one) or "experts"
    value: float


class Injector(LossRecorder):
    """Injects a bad number, and records the digest of the run after every step."""

    def __init__(self, number: BadNumber):
        super().__init__()
        self.number = number
        self.digests: list[str] = []
        self.skipped_batches: list[int] = []

    def start(self, run: Run) -> None:
        self.digests.append(digest(run.setup))
        if dist.get_rank() == self.number.rank:
            model: Any = run.setup.model
            targets = {"loss": model, "norm": model.norm, "experts": model.blocks[1].ffn.experts}
            targets[self.number.target].register_forward_hook(
                lambda module, args, output: self.inject(output) if self.is_due(run) else None
            )

    def is_due(self, run: Run) -> bool:
        return bool(run.batch == self.number.batch and run.setup.model.training)

    def inject(self, output: Any) -> Any:
        value = self.number.value
        if self.number.target == "loss":
            return output._replace(nats=output.nats + value)
        output.register_hook(lambda gradient: gradient + value)
        return output

    def batch_end(self, run: Run, record: Mapping[str, Any]) -> None:
        super().batch_end(run, record)
        self.digests.append(digest(run.setup))

    def skipped(self, run: Run, record: Mapping[str, Any]) -> None:
        self.skipped_batches.append(record["batch"])
        self.digests.append(digest(run.setup))


def train_with_bad_number(
    settings: Settings, number: BadNumber
) -> tuple[list[str], list[int], str]:
    """Train; return the digest after every step, the skipped steps, and the error or ""."""
    injector = Injector(number)
    message = ""
    try:
        train_with(settings, injector)
    except NonFiniteError as error:
        message = str(error)
    return injector.digests, injector.skipped_batches, message


class Terminator(LossRecorder):
    """Sends SIGTERM to one rank after `batch` steps: at once, or in the next collective."""

    def __init__(self, rank: int, batch: int, moment: str):
        super().__init__()
        self.rank = rank
        self.batch = batch
        self.moment = moment  # "collective" or "callback"

    def start(self, run: Run) -> None:
        strategy: Any = run.setup.strategy
        reduce = strategy.reduce

        def terminating_reduce(x: Tensor) -> Tensor:
            self.terminate(run, "collective")
            total: Tensor = reduce(x)
            return total

        strategy.reduce = terminating_reduce

    def batch_end(self, run: Run, record: Mapping[str, Any]) -> None:
        super().batch_end(run, record)
        self.terminate(run, "callback")

    def terminate(self, run: Run, moment: str) -> None:
        if run.batch == self.batch and moment == self.moment and dist.get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def train_until_signal(settings: Settings, rank: int, batch: int, moment: str) -> tuple[str, int]:
    """Train with a signal on one rank; return the message that ends the run, and its last step."""
    terminator = Terminator(rank, batch, moment)
    message = ""
    try:
        train_with(settings, terminator)
    except Stopped as error:
        message = str(error)
    return message, terminator.run.batch


def train_with_full_disk(settings: Settings, rank: int) -> str:
    """Train with a full disk on one rank; return the error that ends the run, or ""."""

    def save_without_space(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == rank:
            kwargs["storage_writer"].write_data = raise_no_space
        return save(*args, **kwargs)

    try:
        with patch.object(dcp, "save", save_without_space):
            train_with(settings, LossRecorder())
    except CheckpointError as error:
        return str(error)
    return ""


def raise_no_space(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def resume_error(settings: Settings) -> str:
    """Return the error that resuming raises, or ""."""
    try:
        loaded(settings)
    except CheckpointError as error:
        return str(error)
    return ""
