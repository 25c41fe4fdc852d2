"""Runs of `tokenyard train` in any layout, and digests of everything that a checkpoint holds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.tensor import DTensor

from tokenyard_models.hf._folder import Reader
from tokenyard_train.bench.commands import run_train
from tokenyard_train.bench.options import TrainOptions
from tokenyard_train.callbacks import Callback
from tokenyard_train.commands.memory import estimate
from tokenyard_train.commands.train import train
from tokenyard_train.config import read_config
from tokenyard_train.engine.resume import resume, start_from
from tokenyard_train.engine.save import run_tensors
from tokenyard_train.engine.setup import Setup, build_setup
from tokenyard_train.engine.step import train_step
from tokenyard_train.records.metrics import NullMetrics


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
    return Result(digest(watch.run.setup), watch.losses, watch.run.batch)


def loaded(settings: dict) -> Result:
    """Build a run and load its newest checkpoint, no more."""
    run = build_setup(read_config(settings), Console(quiet=True))
    position = resume(run, NullMetrics(run.folder))
    return Result(digest(run), [], position.batch)


class Read(NamedTuple):
    """What a rank read of a Hugging Face folder."""

    digest: str  # of the whole model and optimizer
    total: int  # bytes
    largest: int  # bytes that it read at a time
    held: int  # bytes of its parameters


def started(settings: dict) -> Read:
    """Build a run that starts from a Hugging Face folder, and take its weights."""
    sizes, read = [], Reader.read

    def noted(reader: Reader, key: str, box: tuple[slice, ...]) -> torch.Tensor:
        tensor = read(reader, key, box)
        sizes.append(tensor.nbytes)
        return tensor

    run = build_setup(read_config(settings), Console(quiet=True))
    Reader.read = noted
    try:
        start_from(run.model, settings["load_path"])
    finally:
        Reader.read = read
    return Read(
        digest(run), sum(sizes), max(sizes), sum(_local(p).nbytes for p in run.model.parameters())
    )


def benched(path: str, out: str, overrides: list[str]) -> list[str]:
    """Measure training as a file says; return what this rank wrote."""
    folder = Path(out) / str(dist.get_rank())
    options = TrainOptions(config=Path(path), overrides=overrides, steps=2, out=folder)
    run_train(options, Console(quiet=True))
    return sorted(p.name for p in (Path(out) / str(dist.get_rank())).glob("*"))


def gradients(settings: dict) -> dict[str, list[float]]:
    """Return the experts' gradients of the first step, each put together from its shards."""
    run = build_setup(read_config(settings), Console(quiet=True))
    found = {}

    def note(*_) -> None:
        for name, p in run.model.named_parameters():
            if ".experts." in name:
                found[name] = (
                    (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad)
                    .flatten()
                    .tolist()
                )

    run.optimizer.register_step_pre_hook(note)
    train_step(run, 0)
    return found


def initial(settings: dict) -> str:
    """Return the digest of the weights that a new run starts from."""
    return digest(build_setup(read_config(settings), Console(quiet=True)))


def refused(settings: dict) -> str:
    """Return the sentence that a config is refused with."""
    try:
        build_setup(read_config(settings), Console(quiet=True))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def digest(run: Setup) -> str:
    """Return the SHA-256 of all tensors of a checkpoint of the run, each put together from its shards."""
    sha = hashlib.sha256()
    for name, tensor in sorted(run_tensors(run).items()):
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        sha.update(
            name.encode() + full.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return sha.hexdigest()


def memory(settings: dict) -> tuple[int, int, dict[str, int]]:
    """Return the bytes that this rank holds in parameters, and saves for the backward pass; and those estimated."""
    run = build_setup(read_config(settings), Console(quiet=True))
    held = sum(_local(p).numel() * p.element_size() for p in run.model.parameters())
    foretold = estimated(run)
    saved: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    rows = run.data.train.batch(0, run.config.global_train_batch_size, *run.strategy.data)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), run.precision():
        output = run.model(rows[:, :-1])
    gathered = {t.untyped_storage().data_ptr() for p in run.model.parameters() for t in [_local(p)]}
    del output
    return held, sum(size for place, size in saved.items() if place not in gathered), foretold


def estimated(run) -> dict[str, int]:
    return estimate(run.config, run.model, run.strategy.describe(run.model))._asdict()


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
