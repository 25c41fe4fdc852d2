"""Resolve the defaults of a config in one place, so that all later code reads plain values."""

from __future__ import annotations

import math
from typing import Any

from tokenyard import ConfigError, resolve_device, started_processes
from tokenyard.divisors import divisors
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data.schema import StdlibLoader
from tokenyard_train.data.tokenizer import build_tokenizer

_AUTO_TOKENS = 16384  # tokens per forward pass with an automatic microbatch size
_EVAL_TOKENS = 1 << 17  # held-out tokens to score if eval_subset_num_batches is not set


def resolve(
    config: TrainConfig, needs_tokenizer: bool = True, planned: bool = False
) -> TrainConfig:
    """Return the config with device, model sizes, held-out data, folder and batch sizes resolved.

    Without `needs_tokenizer`, a model's vocab_size is not compared with the tokenizer. With
    `planned`, the GPU may be one of another machine. Raises ConfigError.
    """
    length = _max_seq_len(config)
    microbatch = _microbatch(config, length)
    eval_batch = config.device_eval_batch_size or microbatch
    eval_batches = math.ceil(_EVAL_TOKENS / (eval_batch * length))
    # {run_name} is Composer's placeholder
    folder = (config.save_folder or "runs/{run_name}").replace("{run_name}", config.run_name)
    load_path = config.load_path and config.load_path.replace("{run_name}", config.run_name)
    return config.model_copy(
        update={
            "device": str(resolve_device(config.device, planned=planned)),
            "max_seq_len": length,
            "model": _model(config, length, needs_tokenizer),
            "eval_loader": config.eval_loader or _stdlib_held_out(config),
            "eval_subset_num_batches": config.eval_subset_num_batches or eval_batches,
            "save_folder": folder,
            "load_path": load_path,
            "device_train_microbatch_size": microbatch,
            "device_eval_batch_size": eval_batch,
        }
    )


def _max_seq_len(config: TrainConfig) -> int:
    model_length = config.model.get("max_seq_len")
    if not isinstance(model_length, int):  # missing, or refused later by the model's schema
        return config.max_seq_len
    if "max_seq_len" not in config.model_fields_set:
        return model_length
    if model_length < config.max_seq_len:
        raise ConfigError(
            f"max_seq_len is {config.max_seq_len} but model.max_seq_len only {model_length}; "
            "raise that, or drop it"
        )
    return config.max_seq_len


def _model(config: TrainConfig, length: int, needs_tokenizer: bool) -> dict[str, Any]:
    name = config.model.get("name")
    if not isinstance(name, str):
        value = "missing" if name is None else repr(name)
        raise ConfigError(
            f"model.name is {value}; "
            "give the name of a model, such as dbrx, mixtral or mpt_causal_lm"
        )
    if name == "auto":
        raise ConfigError(
            "model.name is 'auto', which could be any model; give a name, such as dbrx or mixtral"
        )
    if not needs_tokenizer and "vocab_size" in config.model:
        return {"max_seq_len": length} | config.model
    tokenizer_ids = build_tokenizer(config.tokenizer).vocab_size
    vocab_size = config.model.get("vocab_size", tokenizer_ids)
    if isinstance(vocab_size, int) and vocab_size < tokenizer_ids:
        raise ConfigError(
            f"model.vocab_size is {vocab_size} but the tokenizer has {tokenizer_ids} ids; "
            "raise it, or drop it"
        )
    return {"max_seq_len": length, "vocab_size": tokenizer_ids} | config.model


def _stdlib_held_out(config: TrainConfig) -> StdlibLoader | None:
    if config.eval_loaders or not isinstance(config.train_loader, StdlibLoader):
        return None
    return config.train_loader


def _microbatch(config: TrainConfig, length: int) -> int:
    rank_batch = _rank_batch(config)
    requested = config.device_train_microbatch_size
    choices = divisors(rank_batch)
    if requested == "auto":
        return max([n for n in choices if n * length <= _AUTO_TOKENS], default=1)
    if rank_batch % requested:
        smaller = [n for n in choices if n < requested][-3:]
        larger = [n for n in choices if n > requested][:3]
        ranks = started_processes()
        batch = f"global_train_batch_size {config.global_train_batch_size}"
        if ranks > 1:
            batch += f" / {ranks} ranks, {rank_batch}"
        raise ConfigError(
            f"device_train_microbatch_size is {requested}, which does not divide {batch}; "
            f"these do: {', '.join(map(str, smaller + larger))}"
        )
    return requested


def _rank_batch(config: TrainConfig) -> int:
    """Return the sequences per rank and step. Raises ConfigError for an uneven split."""
    batch = config.global_train_batch_size
    ranks = started_processes()
    if batch % ranks:
        multiples = [n * ranks for n in (batch // ranks, batch // ranks + 1) if n]
        raise ConfigError(
            f"global_train_batch_size is {batch}, which {ranks} ranks cannot share evenly; "
            f"try {' or '.join(map(str, multiples))}"
        )
    return batch // ranks
