"""Models that stand on disk: of a run, or of a Hugging Face folder."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenyard import ConfigError, Model, resolve_device
from tokenyard.sharded import allocate
from tokenyard_models import from_hf
from tokenyard_train.checkpoint import model_tensors, newest_good, read_meta, read_tensors, verify
from tokenyard_train.config.comparable import comparable_config
from tokenyard_train.config.load import read_config
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.engine.build_model import build_model
from tokenyard_train.engine.precision import COMPUTE_DTYPES, check_precision, computing_in


class Trained(NamedTuple):
    """A model with its weights, the precision it computes in, and what it reads text by."""

    model: Model
    precision: str | None  # a precision of configs; None: the dtype of its weights
    tokenizer: TokenizerConfig
    stops: frozenset[int]  # ids that end a document, besides the tokenizer's
    source: Path | None  # the Hugging Face folder that it is, or that its run began with

    def computing(self) -> AbstractContextManager[None]:
        """Compute in the model's precision; call the model inside of this."""
        return computing_in(self.precision or "fp32", next(self.model.parameters()).device)


def load_trained(path: Path, device: str = "auto", precision: str | None = None) -> Trained:
    """Load a Hugging Face folder, a run's newest good checkpoint, or a checkpoint, to compute with it on a device.

    `precision` is one of COMPUTE_DTYPES. Left out, a run computes in the precision that it was trained in, and a folder
    in the dtype of its weights. Raises TokenyardError.
    """
    place = resolve_device(device, "--device")
    if precision is not None:
        check_precision(precision, "--precision")
    if (path / "config.json").exists():
        return _published(path, place, precision)
    asked = {} if precision is None else {"precision": precision}
    return _run(path, {"device": str(place)} | asked)


def load_weights_only(path: Path) -> Trained:
    """Load what `load_trained` does into host memory, to read its weights; no backend of the config need be usable."""
    if (path / "config.json").exists():
        return _published(path, torch.device("cpu"), None)
    return _run(path, {"device": "cpu", "backends": {}})


def _published(path: Path, device: torch.device, precision: str | None) -> Trained:
    if precision is None:
        model = from_hf(path, device=device)
    else:
        model = from_hf(
            path, device=device, dtype=torch.float32, compute_dtype=COMPUTE_DTYPES[precision]
        )
    return Trained(model, precision, TokenizerConfig(name=str(path)), stops_of(path), path)


def _run(path: Path, changes: dict[str, Any]) -> Trained:
    checkpoint = newest_good(path) if path.is_dir() else None
    if (path / "manifest.json").exists():
        verify(path)
        checkpoint = path
    if checkpoint is None:
        raise ConfigError(
            f"{path} holds no checkpoint; give the folder of a run, such as runs/quickstart, or one from Hugging Face"
        )
    alone = {"global_train_batch_size": 1, "device_train_microbatch_size": 1, "load_path": None}
    meta = read_meta(checkpoint)
    config = read_config(comparable_config(meta["config"]) | alone | changes)
    _, model = build_model(config)
    allocate(model, config.device)
    read_tensors(checkpoint, model_tensors(model))
    began = (meta["config"].get("load_path") or "").removeprefix("hf://")
    source = Path(began) if began and (Path(began) / "config.json").exists() else None
    return Trained(
        model,
        config.precision,
        config.tokenizer,
        stops_of(source) if source else frozenset(),
        source,
    )


def stops_of(folder: Path) -> frozenset[int]:
    """Return the ids that a Hugging Face folder says end a document."""
    try:
        told = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get(
            "eos_token_id"
        )
    except (OSError, ValueError, AttributeError):
        return frozenset()
    ids = told if isinstance(told, list) else [told]
    return frozenset(i for i in ids if isinstance(i, int))
