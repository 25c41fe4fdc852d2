"""Run `bench train` and `bench generate`: check options, measure, print, and write the file."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from tokenyard.errors import ConfigError, one_of
from tokenyard.measure.machine import describe_machine
from tokenyard_cli.console import print_line
from tokenyard_cli.results import Record, check_folder, write_results
from tokenyard_train.bench.generate import Request, bench_generate
from tokenyard_train.bench.generate_table import print_generate
from tokenyard_train.bench.options import BenchGenerateOptions, TrainOptions
from tokenyard_train.bench.train import bench_train
from tokenyard_train.bench.train_peer import BOTH, PEER_DTYPES
from tokenyard_train.bench.train_table import print_train
from tokenyard_train.config import load_config
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.distributed import is_rank0

_SETTINGS = {
    "model",
    "max_seq_len",
    "global_train_batch_size",
    "precision",
    "parallel",
    "backends",
}

_OF_ALL = ("device", "deterministic")  # settings that are set once a process, or of its clock


def run_train(options: TrainOptions, console: Console) -> None:
    """Measure training. Print the table; write ``train.json``. Raises ConfigError."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    one_of("--peer-dtype", options.peer_dtype, PEER_DTYPES)
    config = load_config(options.config, options.overrides)
    variants = _load_variants(options, config)
    peers = {"none": [], "both": list(BOTH)}.get(options.peers, options.peers.split(","))
    progress = console if is_rank0() else Console(quiet=True)
    dtype = PEER_DTYPES[options.peer_dtype]
    check_folder(options.out)
    records = bench_train(config, variants, peers, dtype, options.steps, progress, options.apart)
    if not is_rank0():
        return
    print_train(records, console)
    path = _write("train", options.out, config, records)
    print_line(console, f"wrote {path}")


def run_generate(options: BenchGenerateOptions, console: Console) -> None:
    """Measure generation. Print the table; write ``generate.json``. Raises ConfigError.

    The file is written after each record: a run that is stopped leaves what it measured.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    config = load_config(options.config, options.overrides)
    peers = [] if options.peers == "none" else list(dict.fromkeys(options.peers.split(",")))
    requests = [
        Request(batch, options.prompt_tokens, options.new_tokens)
        for batch in dict.fromkeys(options.batch)
    ]
    check_folder(options.out)
    records = []
    for record in bench_generate(config, peers, requests, options.peer_limit, console):
        records.append(record)
        path = _write("generate", options.out, config, records)
    print_generate(records, console)
    print_line(console, f"wrote {path}")


def _write(kind: str, folder: Path, config: TrainConfig, records: list[Record]) -> Path:
    """Write the records beside the machine and the config. Return the path of the file."""
    content = {
        "kind": kind,
        "machine": describe_machine(torch.device(config.device)),
        "config": config.model_dump(mode="json", include=_SETTINGS),
        "records": records,
    }
    return write_results(folder, kind, content)


def _load_variants(options: TrainOptions, config: TrainConfig) -> dict[str, TrainConfig]:
    """Return the config of each variant by its text. Raises ConfigError for one without effect."""
    variants: dict[str, TrainConfig] = {}
    for text in options.variants:
        if text in variants:
            raise ConfigError(f"--variant {text} is given twice; give it once")
        variant = load_config(options.config, [*options.overrides, text])
        for key in _OF_ALL:
            if getattr(variant, key) != getattr(config, key):
                raise ConfigError(
                    f"--variant {text} changes {key}, which all models of a benchmark share; "
                    f"run bench train once for each {key}"
                )
        variants[text] = variant
    return variants
