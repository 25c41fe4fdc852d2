"""Filling in what a config leaves open, in one place, so that everything after it reads plain values."""

from __future__ import annotations

import math
from typing import Any

from tokenyard import ConfigError, resolve_device, started_processes
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data.schema import StdlibLoader
from tokenyard_train.data.tokenizer import build_tokenizer

_AUTO_TOKENS = 16384  # of one forward pass, when the microbatch size is left to us
_SCORED_TOKENS = 1 << 17  # of held-out text, when their number is left to us


def resolve(config: TrainConfig) -> TrainConfig:
    """Return the config with device, model sizes, held-out data, folder and batches decided. Raises ConfigError."""
    length = _max_seq_len(config)
    microbatch = _microbatch(config, length)
    scored = config.device_eval_batch_size or microbatch
    folder = config.save_folder or "runs/{run_name}"
    return config.model_copy(
        update={
            "device": str(resolve_device(config.device)),
            "max_seq_len": length,
            "model": _model(config, length),
            "eval_loader": config.eval_loader or _own_held_out(config),
            "eval_subset_num_batches": config.eval_subset_num_batches
            or math.ceil(_SCORED_TOKENS / (scored * length)),
            "save_folder": folder.replace("{run_name}", config.run_name),  # as Composer does
            "device_train_microbatch_size": microbatch,
            "device_eval_batch_size": scored,
        }
    )


def _max_seq_len(config: TrainConfig) -> int:
    own = config.model.get("max_seq_len")
    if not isinstance(own, int):  # none, or one that the model's own config will refuse
        return config.max_seq_len
    if "max_seq_len" not in config.model_fields_set:
        return own
    if own < config.max_seq_len:
        raise ConfigError(
            f"max_seq_len is {config.max_seq_len} but model.max_seq_len only {own}; raise that, or drop it"
        )
    return config.max_seq_len


def _model(config: TrainConfig, length: int) -> dict[str, Any]:
    name = config.model.get("name")
    if not isinstance(name, str):
        given = "missing" if name is None else repr(name)
        raise ConfigError(
            f"model.name is {given}; give the name of a model, such as dbrx, mixtral or mpt_causal_lm"
        )
    vocabulary = build_tokenizer(config.tokenizer).vocab_size
    own = config.model.get("vocab_size", vocabulary)
    if isinstance(own, int) and own < vocabulary:
        raise ConfigError(
            f"model.vocab_size is {own} but the tokenizer has {vocabulary} ids; raise it, or drop it"
        )
    return {"max_seq_len": length, "vocab_size": vocabulary} | config.model


def _own_held_out(config: TrainConfig) -> StdlibLoader | None:
    return config.train_loader if isinstance(config.train_loader, StdlibLoader) else None


def _microbatch(config: TrainConfig, length: int) -> int:
    whole, asked, ranks = (
        config.global_train_batch_size,
        config.device_train_microbatch_size,
        started_processes(),
    )
    if whole % ranks:
        closest = " or ".join(str(n * ranks) for n in (whole // ranks, whole // ranks + 1) if n)
        raise ConfigError(
            f"global_train_batch_size is {whole}, which {ranks} processes cannot share evenly; try {closest}"
        )
    batch = whole // ranks
    fitting = divisors(batch)
    if asked == "auto":
        return max([n for n in fitting if n * length <= _AUTO_TOKENS], default=1)
    if batch % asked:
        near = [n for n in fitting if n < asked][-3:] + [n for n in fitting if n > asked][:3]
        divided = f"global_train_batch_size {whole}" + (
            f" / {ranks} processes, {batch}" if ranks > 1 else ""
        )
        fault = f"device_train_microbatch_size is {asked}, which does not divide {divided}"
        raise ConfigError(f"{fault}; these do: {', '.join(map(str, near))}")
    return asked


def divisors(number: int) -> list[int]:
    """List the divisors of a number, ascending."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]
