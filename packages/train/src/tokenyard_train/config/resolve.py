"""Filling in what a config leaves open, in one place, so that everything after it reads plain values."""

from __future__ import annotations

from typing import Any

import torch

from tokenyard import ConfigError
from tokenyard_train.config.schema import PythonStdlib, TrainConfig
from tokenyard_train.data.tokenizer import build_tokenizer

_AUTO_TOKENS = 16384  # of one forward pass, when the microbatch size is left to us


def resolve(config: TrainConfig) -> TrainConfig:
    """Return the config with device, model sizes, held-out data, folder and microbatch decided. Raises ConfigError."""
    length = _max_seq_len(config)
    return config.model_copy(
        update={
            "device": _device(config.device),
            "max_seq_len": length,
            "model": _model(config, length),
            "eval_loader": config.eval_loader or _own_held_out(config),
            "save_folder": config.save_folder or f"runs/{config.run_name}",
            "device_train_microbatch_size": _microbatch(config, length),
            "device_eval_batch_size": config.device_eval_batch_size or _microbatch(config, length),
        }
    )


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"device is {device!r}; give cpu, cuda or auto") from None
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; give cpu, cuda or auto")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, but torch finds no CUDA GPU here; give cpu or auto")
    return device


def _max_seq_len(config: TrainConfig) -> int:
    own = config.model.get("max_seq_len")
    if own is None or not isinstance(own, int):
        return config.max_seq_len
    if "max_seq_len" not in config.model_fields_set:
        return own
    if own < config.max_seq_len:
        raise ConfigError(
            f"max_seq_len is {config.max_seq_len} but model.max_seq_len only {own}; raise that, or drop it"
        )
    return config.max_seq_len


def _model(config: TrainConfig, length: int) -> dict[str, Any]:
    if not isinstance(config.model.get("name"), str):
        raise ConfigError("model.name is missing; give the name of a model, such as dbrx, mixtral or mpt_causal_lm")
    vocabulary = build_tokenizer(config.tokenizer).vocab_size
    own = config.model.get("vocab_size", vocabulary)
    if isinstance(own, int) and own < vocabulary:
        raise ConfigError(f"model.vocab_size is {own} but the tokenizer has {vocabulary} ids; raise it, or drop it")
    return {"max_seq_len": length, "vocab_size": vocabulary} | config.model


def _own_held_out(config: TrainConfig) -> PythonStdlib | None:
    return config.train_loader if isinstance(config.train_loader, PythonStdlib) else None


def _microbatch(config: TrainConfig, length: int) -> int:
    batch, asked = config.global_train_batch_size, config.device_train_microbatch_size
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    if asked == "auto":
        return max([n for n in divisors if n * length <= _AUTO_TOKENS], default=1)
    if batch % asked:
        sizes = ", ".join(str(n) for n in divisors)
        fault = f"device_train_microbatch_size is {asked}, which does not divide global_train_batch_size {batch}"
        raise ConfigError(f"{fault}; these do: {sizes}")
    return asked
