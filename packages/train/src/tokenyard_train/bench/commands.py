"""Run `tokenyard bench train`: check options, measure, print, and write the file."""

from __future__ import annotations

import torch
from rich.console import Console

from tokenyard.errors import one_of
from tokenyard.measure.machine import describe_machine
from tokenyard_cli.console import print_line
from tokenyard_cli.results import write_results
from tokenyard_train.bench.options import TrainOptions
from tokenyard_train.bench.train import bench_train
from tokenyard_train.bench.train_peer import BOTH, PEER_DTYPES
from tokenyard_train.bench.train_table import print_train
from tokenyard_train.config import load_config
from tokenyard_train.distributed import is_rank0

_SETTINGS = {
    "model",
    "max_seq_len",
    "global_train_batch_size",
    "precision",
    "parallel",
    "backends",
}


def run_train(options: TrainOptions, console: Console) -> None:
    """Measure training. Print the table; write ``train.json``. Raises ConfigError."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    one_of("--peer-dtype", options.peer_dtype, PEER_DTYPES)
    config = load_config(options.config, options.overrides)
    variants = {
        text: load_config(options.config, [*options.overrides, text]) for text in options.variants
    }
    peers = {"none": [], "both": list(BOTH)}.get(options.peers, options.peers.split(","))
    progress = console if is_rank0() else Console(quiet=True)
    dtype = PEER_DTYPES[options.peer_dtype]
    records = bench_train(config, variants, peers, dtype, options.steps, progress, options.apart)
    if not is_rank0():
        return
    print_train(records, console)
    content = {
        "kind": "train",
        "machine": describe_machine(torch.device(config.device)),
        "config": config.model_dump(mode="json", include=_SETTINGS),
        "records": records,
    }
    path = write_results(options.out, "train", content)
    print_line(console, f"wrote {path}")
