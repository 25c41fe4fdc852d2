"""Measure the speed of training from a config, and how a step divides into phases."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import nn

from tokenyard import ConfigError, started_processes
from tokenyard.errors import one_of
from tokenyard.measure.breakdown import break_down
from tokenyard.measure.memory import allocation_retries, peak_bytes
from tokenyard.measure.timing import Clock, Spread, Stages, clock_for
from tokenyard.measure.trace import trace
from tokenyard_cli.console import print_line
from tokenyard_cli.results import Record
from tokenyard_train.bench.train_peer import IMPLEMENTATIONS, MixtralPeer, PeerTask, peer_task
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.cuda_graph import MicrobatchGraph
from tokenyard_train.engine.deterministic import deterministic
from tokenyard_train.engine.phases import Stopwatch
from tokenyard_train.engine.setup import Setup, build_setup
from tokenyard_train.engine.step import train_step

Step = Callable[[int], float]
"""Trains on the batch with this number. Returns the loss."""

OURS = "tokenyard"
_WARMUP = 2
_LINES = 5  # on the progress
_PROFILED = 3  # steps, for the kinds of work
_SHOWN = 24  # kernels of a step in the file
_COLLECTIVES = "nccl"  # prefix of the names of NCCL's kernels


@dataclass
class _Entrant:
    """A model that trains in the benchmark, and what its steps gave."""

    name: str
    model: nn.Module
    step: Step
    times: list[float] = field(default_factory=list)  # ms
    loss: float = 0.0  # of the last step
    graph: MicrobatchGraph | None = None

    def graph_bytes(self) -> int:
        """Return the memory that a CUDA graph keeps from step to step."""
        return 0 if self.graph is None else self.graph.bytes()

    def stages(self, batch: int) -> Stages:
        return (lambda _: self.step(batch),)


class _Work(NamedTuple):
    """What each entrant does."""

    console: Console
    device: torch.device
    batch_tokens: int
    flops_per_token: float
    steps: int  # measured, after the first few

    @property
    def last(self) -> int:
        return _WARMUP + self.steps


def bench_train(
    config: TrainConfig,
    peers: Sequence[str],
    peer_dtype: torch.dtype,
    steps: int,
    console: Console,
    apart: bool = False,
) -> list[Record]:
    """Train some steps of a resolved config, each followed by the peers' step on the same batch.

    With `apart`, an entrant is built, trained and freed before the next one. Keeps nothing on disk.
    Under torchrun every rank calls this; their results differ only in the times. Raises ConfigError
    for an unknown peer, for one without a model of this size, and for any peer beside several
    ranks.
    """
    for name in peers:
        one_of("--peers", name, IMPLEMENTATIONS)
    if peers and started_processes() > 1:
        raise ConfigError("--peers run in one process; give --peers none under torchrun")
    with deterministic(config.deterministic), tempfile.TemporaryDirectory() as folder:
        temporary = config.model_copy(update={"save_folder": folder, "autoresume": False})
        setup = build_setup(temporary, console)
        setup.convert_weights()
        task = peer_task(setup, peer_dtype, Path(folder)) if peers else None
        builders = [partial(_peer, task, name) for name in peers if task]
        work = _work(setup, steps)
        if not apart:
            return _measure(work, setup, [build() for build in builders])
        records = _measure(work, setup, [])
        del setup
        return records + [_measure_peer(work, build) for build in builders]


def _work(setup: Setup, steps: int) -> _Work:
    work = f"{steps} steps of {setup.batch_tokens:,} tokens on {setup.config.device}"
    print_line(setup.console, work, "dim")
    return _Work(setup.console, setup.device, setup.batch_tokens, setup.flops_per_token, steps)


def _peer(task: PeerTask, name: str) -> _Entrant:
    peer = MixtralPeer(task, IMPLEMENTATIONS[name])
    return _Entrant(name, peer.model, peer.step)


def _measure(work: _Work, setup: Setup, peers: Sequence[_Entrant]) -> list[Record]:
    """Measure tokenyard and the peers in turns. Ours comes first, and has phases."""
    clock = clock_for(work.device)
    watch = Stopwatch(clock.stamp)

    def step(batch: int) -> float:
        if batch == _WARMUP:
            watch.spans.clear()
        return train_step(setup, batch, phase=watch).result.loss

    ours = _Entrant(OURS, setup.model, step, graph=setup.graph)
    entrants = (ours, *peers)
    _train(work, entrants)
    retries = allocation_retries(work.device)
    phases = watch.totals(lambda begin, end: clock.between([begin, end])[0])
    shares = _shares(phases, sum(ours.times))
    records = [_record(work, entrant) for entrant in entrants]
    records[0] |= {"shares": shares, "allocation_retries": retries}
    return records


def _measure_peer(work: _Work, build: Callable[[], _Entrant]) -> Record:
    """Build a peer where the entrant before it has been freed, and measure it alone."""
    gc.collect()
    if work.device.type == "cuda":
        torch.cuda.empty_cache()
    peer = build()
    _train(work, [peer])
    return _record(work, peer)


def _train(work: _Work, entrants: Sequence[_Entrant]) -> None:
    """Train all entrants on each batch, in turns, and time the steps after the first few."""
    clock = clock_for(work.device)
    names = ", ".join(entrant.name for entrant in entrants)
    for batch in range(work.last):
        if batch % max(1, work.last // _LINES) == 0:
            print_line(work.console, f"  step {batch + 1} of {work.last}: {names} ...", "dim")
        for entrant in entrants:
            milliseconds, entrant.loss = _time_step(entrant.step, batch, clock)
            if batch >= _WARMUP:
                entrant.times.append(milliseconds)
    print_line(work.console, "  profiling ...", "dim")


def _time_step(step: Step, batch: int, clock: Clock) -> tuple[float, float]:
    """Return milliseconds and loss. No cache is flushed: a step leaves nothing useful in it."""
    begin = clock.stamp()
    loss = step(batch)
    return clock.between([begin, clock.stamp()])[0], loss


def _record(work: _Work, entrant: _Entrant) -> Record:
    """Summarise the measured steps, and take further ones for memory and profile."""
    step = Spread.of(entrant.times)
    tokens_per_s = 1e3 * work.batch_tokens / step.median
    parameters = list(entrant.model.parameters())
    stages = entrant.stages(work.last)
    return {
        "contestant": entrant.name,
        "processes": started_processes(),
        "step_ms": step._asdict(),
        "tokens_per_s": round(tokens_per_s, 1),
        "flops_per_s": tokens_per_s * work.flops_per_token,
        "loss": entrant.loss,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "weights": str(parameters[0].dtype).removeprefix("torch."),
        "peak_bytes": peak_bytes(stages, work.device) + entrant.graph_bytes(),
        **_kernels(stages, work.device),
        **_kinds(stages, work.device, step.median),
    }


def _kernels(stages: Stages, device: torch.device) -> Record:
    """Return the kernels of one step, and the milliseconds of each collective among them.

    A collective's time includes its wait for other ranks.
    """
    kernels = trace(stages, device).kernels
    collectives = [kernel for kernel in kernels if kernel.name.startswith(_COLLECTIVES)]
    return {
        "kernels": [kernel._asdict() for kernel in kernels[:_SHOWN]],
        "collectives_ms": {kernel.name: round(kernel.milliseconds, 3) for kernel in collectives},
    }


def _kinds(stages: Stages, device: torch.device, step_ms: float) -> Record:
    """Return where a step goes by kind of work. On a GPU, "gaps" are the time in which it idles.

    Gaps are what kernels leave of the measured step, because the profiler makes them longer.
    """
    kinds, host = break_down(stages, device, _PROFILED)
    if device.type == "cuda":
        kinds["gaps"] = max(0.0, step_ms - sum(kinds.values()))
    total = sum(kinds.values())
    return {
        "kinds": {
            kind: {"ms": round(milliseconds, 3), "share": round(milliseconds / total, 4)}
            for kind, milliseconds in kinds.items()
        },
        "host_ms": round(host, 3),
    }


def _shares(phases: dict[str, float], total: float) -> dict[str, float]:
    """Return each phase's share of the time of all steps, and the rest."""
    shares = {phase: round(milliseconds / total, 4) for phase, milliseconds in phases.items()}
    return shares | {"rest": round(1 - sum(shares.values()), 4)}
