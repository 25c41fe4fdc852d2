"""Measure the speed of training from a config, and how a step divides into phases."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
from tokenyard.peer_memory import shared_bytes
from tokenyard_cli.console import print_line
from tokenyard_cli.results import Record
from tokenyard_train.bench.mixtral import IMPLEMENTATIONS
from tokenyard_train.bench.train_peer import MixtralPeer, PeerTask, peer_task
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.cuda_graph import MicrobatchGraph
from tokenyard_train.engine.deterministic import deterministic
from tokenyard_train.engine.phases import Phases, Stopwatch, untimed
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


class _Work(NamedTuple):
    """What an entrant does."""

    console: Console
    device: torch.device
    batch_tokens: int
    flops_per_token: float
    steps: int  # measured, after the first few

    @property
    def last(self) -> int:
        return _WARMUP + self.steps


@dataclass
class _Entrant:
    """A model that trains in the benchmark, and what its steps gave."""

    name: str
    work: _Work
    model: nn.Module
    step: Step
    times: list[float] = field(default_factory=list)  # ms
    loss: float = 0.0  # of the last step
    graph: MicrobatchGraph | None = None

    def kept_bytes(self) -> int:
        """Return the memory that a CUDA graph and buffers of ranks keep from step to step."""
        graph = 0 if self.graph is None else self.graph.bytes()
        return graph + shared_bytes(self.work.device, weights=False)

    def stages(self, batch: int) -> Stages:
        return (lambda _: self.step(batch),)


def bench_train(
    config: TrainConfig,
    variants: Mapping[str, TrainConfig],
    peers: Sequence[str],
    peer_dtype: torch.dtype,
    steps: int,
    console: Console,
    apart: bool = False,
) -> list[Record]:
    """Train some steps of a resolved config, each followed by the others' step on the same batch.

    The others are `variants`, further configs by name, and peers. With `apart`, each is built,
    trained and freed before the next. Keeps nothing on disk. Under torchrun every rank calls this;
    their results differ only in the times. Raises ConfigError for an unknown peer, for one without
    a model of this size, and for any peer beside several ranks.
    """
    for name in peers:
        one_of("--peers", name, IMPLEMENTATIONS)
    if peers and started_processes() > 1:
        raise ConfigError("--peers run in one process; give --peers none under torchrun")
    with deterministic(config.deterministic), tempfile.TemporaryDirectory() as folder:
        setup = _build(config, folder, console)
        task = peer_task(setup, peer_dtype, Path(folder)) if peers else None
        work = _work(setup, steps)
        print_line(
            console, f"{steps} steps of {work.batch_tokens:,} tokens on {work.device}", "dim"
        )
        others = [partial(_variant, name, variants[name], folder, steps) for name in variants]
        others += [partial(_peer, work, task, name) for name in peers if task]
        if not apart:
            return _measure(setup, work, [build() for build in others])
        records = _measure(setup, work, [])
        del setup
        return records + [_measure_apart(build) for build in others]


def _build(config: TrainConfig, folder: str, console: Console) -> Setup:
    temporary = config.model_copy(update={"save_folder": folder, "autoresume": False})
    setup = build_setup(temporary, console)
    setup.convert_weights()
    return setup


def _work(setup: Setup, steps: int) -> _Work:
    return _Work(setup.console, setup.device, setup.batch_tokens, setup.flops_per_token, steps)


def _variant(name: str, config: TrainConfig, folder: str, steps: int) -> _Entrant:
    setup = _build(config, folder, Console(quiet=True))
    return _ours(name, setup, _work(setup, steps), untimed)


def _ours(name: str, setup: Setup, work: _Work, phase: Phases) -> _Entrant:
    def step(batch: int) -> float:
        step = train_step(setup, batch, phase=phase)
        return step.numbers.loss if step.skipped is not None else step.result.loss

    return _Entrant(name, work, setup.model, step, graph=setup.graph)


def _peer(work: _Work, task: PeerTask, name: str) -> _Entrant:
    peer = MixtralPeer(task, IMPLEMENTATIONS[name])
    return _Entrant(name, work, peer.model, peer.step)


def _measure(setup: Setup, work: _Work, others: Sequence[_Entrant]) -> list[Record]:
    """Measure a config and the others in turns. The config's record comes first, with phases."""
    clock = clock_for(work.device)
    watch = Stopwatch(clock.stamp)
    ours = _ours(OURS, setup, work, watch)
    entrants = (ours, *others)
    _train(work, entrants, watch.spans.clear)
    retries = allocation_retries(work.device)
    phases = watch.totals(lambda begin, end: clock.between([begin, end])[0])
    shares = _shares(phases, sum(ours.times))
    records = [_record(entrant) for entrant in entrants]
    records[0] |= {"shares": shares, "allocation_retries": retries}
    return records


def _measure_apart(build: Callable[[], _Entrant]) -> Record:
    """Build an entrant where the one before has been freed, and measure it."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU
    entrant = build()
    _train(entrant.work, [entrant])
    return _record(entrant)


def _train(
    work: _Work, entrants: Sequence[_Entrant], warm: Callable[[], None] = lambda: None
) -> None:
    """Train all entrants on each batch, in turns. Time the steps after the first few and `warm`."""
    clock = clock_for(work.device)
    names = ", ".join(entrant.name for entrant in entrants)
    for batch in range(work.last):
        if batch % max(1, work.last // _LINES) == 0:
            print_line(work.console, f"  step {batch + 1} of {work.last}: {names} ...", "dim")
        if batch == _WARMUP:
            warm()
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


def _record(entrant: _Entrant) -> Record:
    """Summarise the measured steps, and take further ones for memory and profile."""
    work = entrant.work
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
        "peak_bytes": peak_bytes(stages, work.device) + entrant.kept_bytes(),
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
