"""Runs of `tokenyard train` in any layout, and digests of everything that a checkpoint holds."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.tensor import DTensor

from tokenyard_train.bench.commands import run_train
from tokenyard_train.build import build_run
from tokenyard_train.callbacks import Callback
from tokenyard_train.checkpoint import CheckpointError, write
from tokenyard_train.config import read_config
from tokenyard_train.estimate import estimate
from tokenyard_train.nonfinite import NonFiniteError
from tokenyard_train.resume import _tensors, resume
from tokenyard_train.run import train
from tokenyard_train.stopping import Stopped


class Result(NamedTuple):
    """What a run left."""

    digest: str  # of the whole model and optimizer
    losses: list[float]
    batch: int


class Watch(Callback):
    def __init__(self):
        self.losses, self.run = [], None

    def batch_end(self, run, record):
        self.losses.append(record["loss"])
        self.run = run


def trained(settings: dict) -> Result:
    """Train as settings say."""
    watch = Watch()
    train(read_config(settings), Console(quiet=True), [watch])
    return Result(digest(watch.run), watch.losses, watch.run.batch)


class Inject(Watch):
    """Makes a number not finite, in one step and on one rank; keeps the weights' digest after every step."""

    def __init__(self, rank: int, step: int, where: str, value: float):
        super().__init__()
        self.rank, self.step, self.where, self.value = rank, step, where, value
        self.digests, self.missed = [], []

    def start(self, run):
        self.digests.append(digest(run))
        if dist.get_rank() == self.rank:
            spoilt = run.model.blocks[1].ffn.experts if self.where == "experts" else run.model
            spoilt.register_forward_hook(lambda module, args, output: self.spoil(output) if self.due(run) else None)

    def due(self, run):
        return run.batch == self.step and run.model.training

    def spoil(self, output):
        if self.where == "loss":
            return output._replace(logits=output.logits + self.value)
        (output if self.where == "experts" else output.logits).register_hook(lambda grad: grad + self.value)
        return output

    def batch_end(self, run, record):
        super().batch_end(run, record)
        self.digests.append(digest(run))

    def skipped(self, run, record):
        self.missed.append(record["batch"])
        self.digests.append(digest(run))


def spoilt(settings: dict, *injection) -> tuple[list[str], list[int], str]:
    """Train with a number that is not finite; return the steps' digests, those skipped, and what ended the run."""
    inject, said = Inject(*injection), ""
    try:
        train(read_config(settings), Console(quiet=True), [inject])
    except NonFiniteError as error:
        said = str(error)
    return inject.digests, inject.missed, said


def loaded(settings: dict) -> Result:
    """Build a run and load its newest checkpoint, no more."""
    run = build_run(read_config(settings), Console(quiet=True))
    run.batch = resume(run)
    return Result(digest(run), [], run.batch)


def benched(path: str, out: str, overrides: list[str]) -> list[str]:
    """Measure training as a file says; return what this rank wrote."""
    run_train(Console(quiet=True), Path(out) / str(dist.get_rank()), Path(path), overrides, "none", 2, None)
    return sorted(p.name for p in (Path(out) / str(dist.get_rank())).glob("*"))


class Signal(Watch):
    """Sends SIGTERM to one rank, in the collective of a step or after it."""

    def __init__(self, rank: int, step: int, where: str):
        super().__init__()
        self.rank, self.step, self.where = rank, step, where

    def start(self, run):
        reduce = run.strategy.reduce

        def reduce_and_ask(x):
            if run.batch == self.step and self.where == "collective" and dist.get_rank() == self.rank:
                os.kill(os.getpid(), signal.SIGTERM)
            return reduce(x)

        run.strategy.reduce = reduce_and_ask

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
    save = write.dcp_save

    def full(*args, **kwargs):
        planner = kwargs["storage_writer"]
        if dist.get_rank() == rank:
            planner.write_data = _no_space
        return save(*args, **kwargs)

    write.dcp_save = full
    try:
        train(read_config(settings), Console(quiet=True))
    except CheckpointError as error:
        return str(error)
    finally:
        write.dcp_save = save
    return "trained"


def _no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def initial(settings: dict) -> str:
    """Return the digest of the weights that a new run starts from."""
    return digest(build_run(read_config(settings), Console(quiet=True)))


def refused(settings: dict) -> str:
    """Return the sentence that a config is refused with."""
    try:
        build_run(read_config(settings), Console(quiet=True))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def refused_resume(settings: dict) -> str:
    """Return the sentence that going on from a folder is refused with."""
    try:
        loaded(settings)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def digest(run) -> str:
    """Return the SHA-256 of all tensors of a checkpoint of the run, each put together from its shards."""
    sha = hashlib.sha256()
    for name, tensor in sorted(_tensors(run).items()):
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        sha.update(name.encode() + full.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def memory(settings: dict) -> tuple[int, int, dict[str, int]]:
    """Return the bytes that this rank holds in parameters, and saves for the backward pass; and those estimated."""
    run = build_run(read_config(settings), Console(quiet=True))
    held = sum(_local(p).numel() * p.element_size() for p in run.model.parameters())
    saved: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    rows = run.data.train.batch(0, run.config.global_train_batch_size, *run.strategy.data)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), run.precision():
        output = run.model(rows[:, :-1])
    gathered = {t.untyped_storage().data_ptr() for p in run.model.parameters() for t in [_local(p)]}
    del output
    return held, sum(size for place, size in saved.items() if place not in gathered), estimated(run)


def estimated(run) -> dict[str, int]:
    return estimate(run.config, run.model, run.strategy.describe(run.model))._asdict()


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
