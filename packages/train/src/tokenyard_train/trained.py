"""Models that stand on disk: of a run, or of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenyard import ConfigError
from tokenyard_models import from_hf
from tokenyard_train.build import build_model
from tokenyard_train.checkpoint import model_tensors, newest_good, read_meta, read_tensors, verify
from tokenyard_train.config.data import Tokenizer as TokenizerConfig
from tokenyard_train.config.layout_free import layout_free
from tokenyard_train.config.load import read_config


class Trained(NamedTuple):
    """A model with its weights, and what it reads text by."""

    model: Any
    tokenizer: TokenizerConfig
    stops: frozenset[int]  # ids that end a document, besides the tokenizer's
    source: Path | None  # the Hugging Face folder that it is, or that its run began with


def load_trained(path: Path) -> Trained:
    """Load a Hugging Face folder, a run's newest good checkpoint, or a checkpoint. Raises TokenyardError."""
    return _published(path) if (path / "config.json").exists() else _run(path)


def _published(path: Path) -> Trained:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Trained(from_hf(path, device=device), TokenizerConfig(name=str(path)), stops_of(path), path)


def _run(path: Path) -> Trained:
    checkpoint = newest_good(path) if path.is_dir() else None
    if (path / "manifest.json").exists():
        verify(path)
        checkpoint = path
    if checkpoint is None:
        raise ConfigError(
            f"{path} holds no checkpoint; give the folder of a run, such as runs/quickstart, or one from Hugging Face"
        )
    alone = {"device": "auto", "global_train_batch_size": 1, "device_train_microbatch_size": 1, "load_path": None}
    meta = read_meta(checkpoint)
    config = read_config(layout_free(meta["config"]) | alone)
    _, model = build_model(config)
    model.to_empty(device=config.device)
    read_tensors(checkpoint, model_tensors(model))
    began = (meta["config"].get("load_path") or "").removeprefix("hf://")
    source = Path(began) if began and (Path(began) / "config.json").exists() else None
    return Trained(model, config.tokenizer, stops_of(source) if source else frozenset(), source)


def stops_of(folder: Path) -> frozenset[int]:
    """Return the ids that a Hugging Face folder says end a document."""
    try:
        told = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return frozenset()
    ids = told if isinstance(told, list) else [told]
    return frozenset(i for i in ids if isinstance(i, int))
