"""Generating from a run's folder: its newest good checkpoint says which model it is."""

from __future__ import annotations

from pathlib import Path

from tokenyard import ConfigError
from tokenyard_train.build import build_model
from tokenyard_train.checkpoint import model_tensors, newest_good, read_meta, read_tensors
from tokenyard_train.config.layout_free import layout_free
from tokenyard_train.config.load import read_config
from tokenyard_train.data import build_tokenizer
from tokenyard_train.sampling import continue_text


def generate(run_folder: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """Return how the model of a run continues a prompt. Raises ConfigError or CheckpointError."""
    checkpoint = newest_good(run_folder) if run_folder.is_dir() else None
    if checkpoint is None:
        raise ConfigError(f"{run_folder} holds no checkpoint; give the folder of a run, such as runs/quickstart")
    alone = {"device": "auto", "global_train_batch_size": 1, "device_train_microbatch_size": 1}
    config = read_config(layout_free(read_meta(checkpoint)["config"]) | alone)
    _, model = build_model(config)
    model.to_empty(device=config.device)
    read_tensors(checkpoint, model_tensors(model))
    return continue_text(model, build_tokenizer(config.tokenizer), prompt, max_new_tokens, temperature, seed)
