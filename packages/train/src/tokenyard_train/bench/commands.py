"""What `tokenyard bench train` does: check the options, measure, print, and write the file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from rich.console import Console

from tokenyard import ConfigError
from tokenyard.errors import did_you_mean
from tokenyard.measure.machine import describe_machine
from tokenyard_cli.results import write_results
from tokenyard_train.bench.train import bench_train, print_train
from tokenyard_train.bench.train_peer import BOTH, PEER_DTYPES
from tokenyard_train.config import load_config
from tokenyard_train.distributed import is_rank0


def run_train(
    console: Console,
    out: Path,
    config: Path,
    overrides: Sequence[str],
    peers: str,
    peer_dtype: str,
    steps: int,
    threads: int | None,
) -> None:
    """Measure training; print the table and write ``train.json``. Raises ConfigError."""
    if threads is not None:
        torch.set_num_threads(threads)
    one_of("--peer-dtype", [peer_dtype], PEER_DTYPES)
    resolved = load_config(config, overrides)
    names = {"none": [], "both": list(BOTH)}.get(peers, peers.split(","))
    dtype = PEER_DTYPES[peer_dtype]
    records = bench_train(
        resolved, names, dtype, steps, console if is_rank0() else Console(quiet=True)
    )
    if not is_rank0():
        return
    print_train(records, console)
    machine = describe_machine(torch.device(resolved.device))
    settings = resolved.model_dump(
        mode="json",
        include={
            "model",
            "max_seq_len",
            "global_train_batch_size",
            "precision",
            "parallel",
            "backends",
        },
    )
    path = write_results(
        out, "train", {"kind": "train", "machine": machine, "config": settings, "records": records}
    )
    console.print(f"wrote {path}", highlight=False)


def one_of(option: str, given: Sequence[str], known: Collection[str]) -> None:
    """Raise ConfigError for a value that an option does not take."""
    for value in given:
        if value not in known:
            raise ConfigError(
                f"{option} {value!r} is unknown{did_you_mean(value, known)}; known are: {', '.join(known)}"
            )
