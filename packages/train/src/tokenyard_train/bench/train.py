"""`tokenyard bench train`: the speed of training as a config says, and where the time of a step goes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tokenyard import ConfigError, started_processes
from tokenyard.errors import did_you_mean
from tokenyard.measure.memory import allocation_retries, peak_bytes
from tokenyard.measure.timing import Clock, Spread, Stages, clock_for
from tokenyard.measure.trace import trace
from tokenyard_train.bench.train_peer import IMPLEMENTATIONS, MixtralPeer
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.deterministic import deterministic
from tokenyard_train.engine.phases import Stopwatch
from tokenyard_train.engine.setup import Setup, build_setup
from tokenyard_train.engine.step import train_step

Record = dict[str, Any]
Work = Callable[[int], float]  # takes a step on the batch of that number; returns its loss

_WARMUP = 2
_SHOWN = 24  # kernels of a step
_COLLECTIVES = "nccl"  # how the names of their kernels begin
OURS = "tokenyard"


def bench_train(
    config: TrainConfig, peers: Sequence[str], peer_dtype: torch.dtype, steps: int, console: Console
) -> list[Record]:
    """Train some steps of a resolved config, each followed by the peers' step on the same batch; nothing is kept.

    Under torchrun all processes do, and return the same but for their own times. Raises ConfigError for an unknown
    peer, one that has no model of this size, or any beside several processes.
    """
    for name in peers:
        if name not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise ConfigError(
                f"--peers {name!r} is unknown{did_you_mean(name, IMPLEMENTATIONS)}; known are: {known}"
            )
    if peers and started_processes() > 1:
        raise ConfigError("--peers run in one process; give --peers none under torchrun")
    with deterministic(config.deterministic), tempfile.TemporaryDirectory() as folder:
        setup = build_setup(
            config.model_copy(update={"save_folder": folder, "autoresume": False}), console
        )
        others = {name: MixtralPeer(setup, IMPLEMENTATIONS[name], peer_dtype) for name in peers}
        setup.console.print(
            f"{steps} steps of {setup.batch_tokens:,} tokens on {config.device} ...", style="dim"
        )
        return _measured(setup, others, steps)


def _measured(setup: Setup, peers: dict[str, MixtralPeer], steps: int) -> list[Record]:
    clock = clock_for(setup.device)
    watch = Stopwatch(clock.stamp)
    works: dict[str, Work] = {OURS: lambda batch: train_step(setup, batch, phase=watch).result.loss}
    works |= {name: peer.step for name, peer in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    losses: dict[str, float] = {}
    last = _WARMUP + steps
    for batch in range(last):
        if batch == _WARMUP:
            watch.spans.clear()
        for name, work in works.items():
            milliseconds, losses[name] = _timed(work, batch, clock)
            if batch >= _WARMUP:
                times[name].append(milliseconds)
    retries = allocation_retries(setup.device)
    shares = _shares(watch.totals(lambda a, b: clock.between([a, b])[0]), sum(times[OURS]))
    models = {OURS: setup.model, **{name: peer.model for name, peer in peers.items()}}
    return [
        _record(setup, name, times[name], losses[name])
        | {"parameters": _parameters(models[name]), "weights": _dtype(models[name])}
        | {"peak_bytes": peak_bytes(_stages(work, last), setup.device)}
        | _launched(setup, _stages(work, last))
        | ({"shares": shares, "allocation_retries": retries} if name == OURS else {})
        for name, work in works.items()
    ]


def _launched(setup: Setup, stages: Stages) -> Record:
    """Return the kernels of one more step, and the milliseconds of those that are collectives, by name.

    A collective's time includes that in which it waits for other ranks.
    """
    seen = trace(stages, setup.device).kernels
    collectives = {
        k.name: round(k.milliseconds, 3) for k in seen if k.name.startswith(_COLLECTIVES)
    }
    return {
        "kernels": [kernel._asdict() for kernel in seen[:_SHOWN]],
        "collectives_ms": collectives,
    }


def _stages(work: Work, batch: int) -> Stages:
    return (lambda _: work(batch),)


def _timed(work: Work, batch: int, clock: Clock) -> tuple[float, float]:
    """Run a step; no cache is flushed, since a step leaves nothing of use in it."""
    began = clock.stamp()
    loss = work(batch)
    return clock.between([began, clock.stamp()])[0], loss


def _record(setup: Setup, name: str, times: list[float], loss: float) -> Record:
    step = Spread.of(times)
    speed = 1e3 * setup.batch_tokens / step.median
    return {
        "contestant": name,
        "processes": started_processes(),
        "step_ms": step._asdict(),
        "tokens_per_s": round(speed, 1),
        "flops_per_s": speed * setup.flops_per_token,
        "loss": loss,
    }


def _shares(totals: dict[str, float], whole: float) -> dict[str, float]:
    shares = {phase: round(total / whole, 4) for phase, total in totals.items()}
    return shares | {"rest": round(1 - sum(shares.values()), 4)}


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _dtype(model: Any) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def print_train(records: Sequence[Record], console: Console) -> None:
    """Print speed and memory of each contestant, and our shares of time."""
    columns = (
        "step ms",
        "tokens/s",
        "of a process",
        "its GFLOP/s",
        "peak MiB",
        "parameters",
        "weights",
    )
    table = Table("", *columns, "ours / theirs", title_justify="left")
    ours = records[0]
    for record in records:
        ratio = ours["tokens_per_s"] / record["tokens_per_s"]
        table.add_row(
            record["contestant"],
            f"{record['step_ms']['median']:.1f}",
            f"{record['tokens_per_s']:,.0f}",
            f"{record['tokens_per_s'] / record['processes']:,.0f}",
            f"{record['flops_per_s'] / record['processes'] / 1e9:.1f}",
            f"{record['peak_bytes'] / 2**20:.0f}",
            f"{record['parameters']:,}",
            record["weights"],
            "" if record is ours else f"{ratio:.2f}x",
        )
    console.print(table)
    shares = ", ".join(f"{phase} {100 * share:.1f} %" for phase, share in ours["shares"].items())
    console.print(f"where our step's time goes: {shares}", highlight=False)
    if retries := ours["allocation_retries"]:
        console.print(
            f"memory was full {retries} times; PYTORCH_ALLOC_CONF=expandable_segments:True may help"
        )
    for name, milliseconds in ours["collectives_ms"].items():
        share = 100 * milliseconds / ours["step_ms"]["median"]
        console.print(
            f"{name}: {milliseconds:.1f} ms, {share:.1f} % of a step, beside other work",
            highlight=False,
        )
