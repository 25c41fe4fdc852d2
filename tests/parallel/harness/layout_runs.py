"""Runs of `tokenyard train` on one rank of any layout, and digests of their state."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tokenyard.sharded import local_part
from tokenyard.testing._over_ranks import full
from tokenyard_models.hf import Folder
from tokenyard_parallel._torch_private import begin_all_to_all, end_all_to_all
from tokenyard_parallel.meshes import MeshSizes, make_mesh
from tokenyard_parallel.strategies import _gradient_sum
from tokenyard_parallel.strategies._packed_gradients import sum_narrow
from tokenyard_train.bench.commands import run_train
from tokenyard_train.bench.options import TrainOptions
from tokenyard_train.callbacks import Callback
from tokenyard_train.commands.memory import estimate
from tokenyard_train.commands.train import train
from tokenyard_train.config import read_config
from tokenyard_train.engine.microbatch import accumulate
from tokenyard_train.engine.precision import COMPUTE_DTYPES
from tokenyard_train.engine.resume import resume, start_from
from tokenyard_train.engine.save import run_tensors
from tokenyard_train.engine.setup import Setup, build_setup
from tokenyard_train.engine.state import Run
from tokenyard_train.engine.step import train_step
from tokenyard_train.engine.whole_matrices import on_whole_matrices
from tokenyard_train.records import plots
from tokenyard_train.records.metrics import NullMetrics

Settings = dict[str, Any]


class Result(NamedTuple):
    """The state of a run after its last step."""

    digest: str  # of the model and the optimizer, gathered
    losses: list[float]
    batch: int


class LossRecorder(Callback):
    """Records the loss of every step, and the run."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.run: Any = None

    def batch_end(self, run: Run, record: Mapping[str, Any]) -> None:
        self.losses.append(record["loss"])
        self.run = run


def trained(settings: Settings) -> Result:
    """Train."""
    recorder = LossRecorder()
    train_with(settings, recorder)
    return Result(digest(recorder.run.setup), recorder.losses, recorder.run.batch)


def finished(settings: Settings) -> None:
    """Train what is left of a run, which may be nothing."""
    train_with(settings, Callback())


def train_with(settings: Settings, callback: Callback) -> None:
    """Train with a callback, and without the figures: they take longer than the steps."""
    with patch.multiple(plots, loss_curve=Mock(), expert_heatmap=Mock()):
        train(read_config(settings), Console(quiet=True), [callback])


def loaded(settings: Settings) -> Result:
    """Build a run and load its newest checkpoint, without a step."""
    setup = build(settings)
    position = resume(setup, NullMetrics(setup.folder))
    return Result(digest(setup), [], position.batch)


def initial_digest(settings: Settings) -> str:
    """Return the digest of the initial weights."""
    return digest(build(settings))


def build_error(settings: Settings) -> str:
    """Return the type and the message of the error that building a run raises."""
    try:
        build(settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class HfRead(NamedTuple):
    """What a rank read from a Hugging Face folder."""

    digest: str  # of the model and the optimizer, gathered
    total: int  # bytes read
    largest: int  # bytes of the largest read
    held: int  # bytes of this rank's parameters


def read_hf(settings: Settings) -> HfRead:
    """Build a run that starts from the weights of a Hugging Face folder."""
    sizes: list[int] = []
    make_reader = Folder.reader

    def counting_reader(folder: Folder, name: str) -> Any:
        reader: Any = make_reader(folder, name)
        read = reader.read

        def counting_read(*args: Any) -> Tensor:
            tensor: Tensor = read(*args)
            sizes.append(tensor.nbytes)
            return tensor

        reader.read = counting_read
        return reader

    setup = build(settings)
    with patch.object(Folder, "reader", counting_reader):
        start_from(setup.model, settings["load_path"])
    return HfRead(digest(setup), sum(sizes), max(sizes), parameter_bytes(setup))


def bench_train(path: str, out: str, overrides: list[str]) -> list[str]:
    """Run `tokenyard bench train`; return the names of the files that this rank wrote."""
    folder = Path(out) / str(dist.get_rank())
    options = TrainOptions(config=Path(path), overrides=overrides, steps=2, out=folder)
    run_train(options, Console(quiet=True))
    return sorted(path.name for path in folder.glob("*"))


def gradients_of(
    settings: Settings, experts: bool, early: int = _gradient_sum.EARLY
) -> dict[str, list[float]]:
    """Return the gradients of the first step, of experts or of all else, gathered.

    `ddp` sums `early` numbers at a time.
    """
    with patch.object(_gradient_sum, "EARLY", early):
        return _gradients_of(settings, experts)


def _gradients_of(settings: Settings, experts: bool) -> dict[str, list[float]]:
    setup = build(settings)
    setup.convert_weights()
    gradients: dict[str, list[float]] = {}

    def record(*_: Any) -> None:
        for name, parameter in setup.model.named_parameters():
            if (".experts." in name) == experts and parameter.grad is not None:
                gradients[name] = full(parameter.grad).flatten().tolist()

    setup.optimizer.register_step_pre_hook(record)
    train_step(setup, 0)
    return gradients


def sums_of_a_step(settings: Settings, early: int = _gradient_sum.EARLY) -> list[int]:
    """Return how many numbers each all-reduce of the first forward and backward pass sums.

    It is negative for one that begins before the backward pass has reached the embedding. `ddp`
    sums `early` numbers at a time.
    """
    setup = build(settings)
    sums: list[int] = []
    all_reduce = dist.all_reduce

    def note(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        within = torch._C._current_graph_task_id() >= 0 and setup.model.embed.weight.grad is None
        sums.append(-tensor.numel() if within else tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    with patch.object(_gradient_sum, "EARLY", early), patch.object(dist, "all_reduce", note):
        accumulate(setup, 0)
    return sums


def narrow_sums() -> tuple[list[float], list[float]]:
    """Sum bfloat16 numbers over ranks; return the sums, and those of one process."""
    rank = dist.get_rank()
    parts = torch.randn(
        dist.get_world_size(), 30, generator=torch.Generator().manual_seed(3)
    ).bfloat16()
    flat = parts[rank].clone()
    sum_narrow(flat, torch.float32, dist.group.WORLD)
    return flat.tolist(), parts.float().sum(0).bfloat16().tolist()


def compiled(settings: Settings) -> tuple[list[float], int]:
    """Return the losses of two steps with compiled blocks, and how many graphs were compiled.

    AOT autograd alone compiles: no C++ compiler is needed.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    traced = partial(torch.compile, backend="aot_eager")
    missing = "tokenyard_train.engine.compile.missing_compiler"
    with patch.object(torch, "compile", traced), patch(missing, lambda device: None):
        setup = build(settings | {"compile": True})
        losses = [train_step(setup, batch).result.loss for batch in range(2)]
    return losses, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def whole_matrices(shapes: list[tuple[int, ...]], dim: int) -> dict[str, bool]:
    """Compute matrices that are cut along `dim`: return whether the rank's parts are right."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = [torch.arange(math.prod(shape)).double().view(shape) for shape in shapes]
    sharded = [distribute_tensor(x, mesh, [Shard(x.dim() + dim)]) for x in whole]

    def compute(parameters: Sequence[Tensor], stacks: Sequence[Tensor]) -> list[Tensor]:
        return [x * x.sum((-2, -1), keepdim=True) for x in stacks]

    got = on_whole_matrices(sharded, [local_part(x) for x in sharded], compute)
    want = [distribute_tensor(x, mesh, [Shard(x.dim() + dim)]) for x in compute([], whole)]
    return {
        str(tuple(x.shape)): torch.equal(part, local_part(right))
        for x, part, right in zip(whole, got, want)
    }


class MemoryUse(NamedTuple):
    """The memory of a rank, measured, and the estimate of `tokenyard check`."""

    parameters: int  # bytes
    saved: int  # bytes saved for the backward pass, without parameters
    estimate: dict[str, int]


def memory_use(settings: Settings) -> MemoryUse:
    """Measure the parameters of this rank, and what a forward pass saves for the backward pass."""
    setup = build(settings)
    setup.convert_weights()
    parameters = parameter_bytes(setup)
    estimated = estimate(setup.config, setup.model, setup.strategy.describe(setup.model))._asdict()
    saved: dict[int, int] = {}  # bytes by the address of a storage

    def record(tensor: Tensor) -> torch.UntypedStorage:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return storage  # a node that saves its own result would keep itself alive by the tensor

    rows = setup.data.train.batch(0, setup.config.global_train_batch_size, *setup.strategy.data)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), setup.precision():
        # the output keeps the graph, and so the storages, alive
        output = setup.model(rows[:, :-1])
    storages = {local_part(p).untyped_storage().data_ptr() for p in setup.model.parameters()}
    del output
    activations = sum(size for address, size in saved.items() if address not in storages)
    return MemoryUse(parameters, activations, estimated)


def group_timeouts(seconds: float) -> list[timedelta]:
    """Return the timeouts of all process groups of a mesh that a strategy makes."""
    mesh = make_mesh(MeshSizes(1, 2), torch.device("cpu"), timedelta(seconds=seconds))
    groups: list[Any] = mesh.get_all_groups()
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def send_own_rank() -> list[int]:
    """Send rank r's number to rank 0 once and to rank 1 twice; return what arrives."""
    rank = dist.get_rank()
    counts = [rank + 1, rank + 1]
    sent = torch.full((3,), rank)
    arriving = begin_all_to_all(sent, [1, 2], counts, dist.group.WORLD)
    received: list[int] = end_all_to_all(arriving).tolist()
    return received


def build(settings: Settings) -> Setup:
    return build_setup(read_config(settings), Console(quiet=True))


def parameter_bytes(setup: Setup) -> int:
    return sum(local_part(p).nbytes for p in setup.model.parameters())


def digest(setup: Setup) -> str:
    """Return the SHA-256 of the model and the optimizer, each tensor gathered from its shards."""
    sha = hashlib.sha256()
    for name, tensor in sorted(run_tensors(setup).items()):
        content = full(tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        sha.update(name.encode() + content)
    return sha.hexdigest()


def packed_gradients(settings: Settings) -> dict[str, Any]:
    """Return the loss, token counts and gradients of the first batch, in float64, gathered."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with patch.dict(COMPUTE_DTYPES, fp32=torch.float64):
            setup = build(settings)
        setup.model.train()
        loss, _, tokens, supervised = accumulate(setup, 0)
    finally:
        torch.set_default_dtype(before)
    numbers = {"loss": loss.item(), "tokens": int(tokens), "supervised": int(supervised)}
    gradients = {
        name: full(p.grad).flatten().tolist()
        for name, p in setup.model.named_parameters()
        if p.grad is not None
    }
    return numbers | gradients
