"""Runs of `tokenyard train` that something happens to, on one rank or between two steps."""

from __future__ import annotations

import errno
import os
import signal

import torch.distributed as dist
from rich.console import Console

from harness.layout_runs import Watch, digest, loaded
from tokenyard_train.checkpoint import CheckpointError, dcp
from tokenyard_train.commands.train import train
from tokenyard_train.config import read_config
from tokenyard_train.engine.nonfinite import NonFiniteError
from tokenyard_train.engine.signals import Stopped


class Inject(Watch):
    """Makes a number not finite, in one step and on one rank; keeps the weights' digest after every step."""

    def __init__(self, rank: int, step: int, where: str, value: float):
        super().__init__()
        self.rank, self.step, self.where, self.value = rank, step, where, value
        self.digests, self.missed = [], []

    def start(self, run):
        self.digests.append(digest(run.setup))
        if dist.get_rank() == self.rank:
            model = run.setup.model
            spoilt = model.blocks[1].ffn.experts if self.where == "experts" else model
            spoilt.register_forward_hook(
                lambda module, args, output: self.spoil(output) if self.due(run) else None
            )

    def due(self, run):
        return run.batch == self.step and run.setup.model.training

    def spoil(self, output):
        if self.where == "loss":
            return output._replace(logits=output.logits + self.value)
        (output if self.where == "experts" else output.logits).register_hook(
            lambda grad: grad + self.value
        )
        return output

    def batch_end(self, run, record):
        super().batch_end(run, record)
        self.digests.append(digest(run.setup))

    def skipped(self, run, record):
        self.missed.append(record["batch"])
        self.digests.append(digest(run.setup))


def spoilt(settings: dict, *injection) -> tuple[list[str], list[int], str]:
    """Train with a number that is not finite; return the steps' digests, those skipped, and what ended the run."""
    inject, said = Inject(*injection), ""
    try:
        train(read_config(settings), Console(quiet=True), [inject])
    except NonFiniteError as error:
        said = str(error)
    return inject.digests, inject.missed, said


class Signal(Watch):
    """Sends SIGTERM to one rank, in the collective of a step or after it."""

    def __init__(self, rank: int, step: int, where: str):
        super().__init__()
        self.rank, self.step, self.where = rank, step, where

    def start(self, run):
        reduce = run.setup.strategy.reduce

        def reduce_and_ask(x):
            if (
                run.batch == self.step
                and self.where == "collective"
                and dist.get_rank() == self.rank
            ):
                os.kill(os.getpid(), signal.SIGTERM)
            return reduce(x)

        run.setup.strategy.reduce = reduce_and_ask

    def batch_end(self, run, record):
        super().batch_end(run, record)
        if run.batch == self.step and self.where == "callback" and dist.get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def asked(settings: dict, *how) -> tuple[str, int]:
    """Train while one rank is asked to stop; return the sentence that ends the run, and the batch it ends after."""
    watch = Signal(*how)
    try:
        train(read_config(settings), Console(quiet=True), [watch])
    except Stopped as error:
        return str(error), watch.run.batch
    return "trained", watch.run.batch


def unwritable(settings: dict, rank: int) -> str:
    """Train while one rank's disk is full; return the sentence that ends the run."""
    save = dcp.save

    def full(*args, **kwargs):
        planner = kwargs["storage_writer"]
        if dist.get_rank() == rank:
            planner.write_data = _no_space
        return save(*args, **kwargs)

    dcp.save = full
    try:
        train(read_config(settings), Console(quiet=True))
    except CheckpointError as error:
        return str(error)
    finally:
        dcp.save = save
    return "trained"


def _no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refused_resume(settings: dict) -> str:
    """Return the sentence that going on from a folder is refused with."""
    try:
        loaded(settings)
    except CheckpointError as error:
        return str(error)
    return "loaded"
