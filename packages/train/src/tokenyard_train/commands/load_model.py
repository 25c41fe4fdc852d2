"""Load a model from a run, a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenyard import ConfigError, Model, resolve_device
from tokenyard.bounded import read_json
from tokenyard.sharded import allocate
from tokenyard_models import from_hf
from tokenyard_train.checkpoint import (
    is_checkpoint,
    model_tensors,
    read_meta,
    read_newest,
    read_tensors,
    verify,
)
from tokenyard_train.config.comparable import comparable_config
from tokenyard_train.config.load import read_config
from tokenyard_train.data.paths import HF
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.engine.build_model import build_model
from tokenyard_train.engine.precision import COMPUTE_DTYPES, check_precision, computing_in

log = logging.getLogger("tokenyard")


class LoadedModel(NamedTuple):
    """A model with weights, its precision and its tokenizer."""

    model: Model
    precision: str | None  # a config's precision; None: the dtype of the weights
    tokenizer: TokenizerConfig
    stops: frozenset[int]  # ids that end a document, in addition to the tokenizer's
    source: Path | None  # the Hugging Face folder of the model, or of its run's load_path

    def autocast(self) -> AbstractContextManager[None]:
        """Context: call the model inside it to compute in the model's precision."""
        return computing_in(self.precision or "fp32", next(self.model.parameters()).device)


def load_trained(path: Path, device: str = "auto", precision: str | None = None) -> LoadedModel:
    """Load a Hugging Face folder, a checkpoint, or a run's newest good checkpoint on a device.

    `precision` is one of COMPUTE_DTYPES. The default is the precision of training for a run, and
    the dtype of the weights for a Hugging Face folder. Raises TokenyardError.
    """
    target = resolve_device(device, "--device")
    if precision is not None:
        check_precision(precision, "--precision")
    if _is_hf_folder(path):
        return _load_hf_folder(path, target, precision)
    overrides = {} if precision is None else {"precision": precision}
    return _load_run(path, {"device": str(target)} | overrides)


def load_weights_only(path: Path) -> LoadedModel:
    """Load a model into host memory to read its weights. Ignores the config's backends."""
    if _is_hf_folder(path):
        return _load_hf_folder(path, torch.device("cpu"), None)
    return _load_run(path, {"device": "cpu", "backends": {}})


def _is_hf_folder(path: Path) -> bool:
    return (path / "config.json").exists()


def _load_hf_folder(path: Path, device: torch.device, precision: str | None) -> LoadedModel:
    if precision is None:
        model = from_hf(path, device=device)
    else:
        model = from_hf(
            path, device=device, dtype=torch.float32, compute_dtype=COMPUTE_DTYPES[precision]
        )
    return LoadedModel(model, precision, TokenizerConfig(name=str(path)), stop_ids(path), path)


def _load_run(path: Path, overrides: dict[str, Any]) -> LoadedModel:
    """Load a checkpoint, or a run's newest good one, with some keys of its config replaced."""
    if is_checkpoint(path):
        verify(path)
        return _load_checkpoint(path, overrides)
    loaded = read_newest(path, lambda newest: _load_checkpoint(newest, overrides))
    if loaded is None:
        raise ConfigError(
            f"{path} holds no checkpoint; give the folder of a run, such as runs/quickstart, "
            "or one from Hugging Face"
        )
    return loaded


def _load_checkpoint(checkpoint: Path, overrides: dict[str, Any]) -> LoadedModel:
    """Load a verified checkpoint, with some keys of its config replaced."""
    # The batch size of one process. The weights come from the checkpoint, not from load_path.
    inference = {"global_train_batch_size": 1, "device_train_microbatch_size": 1, "load_path": None}
    saved = read_meta(checkpoint)["config"]
    config = read_config(comparable_config(saved) | inference | overrides)
    _, model = build_model(config)
    allocate(model, config.device)
    read_tensors(checkpoint, model_tensors(model))
    source = _hf_source(saved)
    stops = frozenset[int]() if source is None else stop_ids(source)
    return LoadedModel(model, config.precision, config.tokenizer, stops, source)


def _hf_source(config: Mapping[str, Any]) -> Path | None:
    """Return the Hugging Face folder that a run started from, if it still exists."""
    load_path = config.get("load_path")
    if not load_path:
        return None
    folder = Path(load_path.removeprefix(HF))
    return folder if _is_hf_folder(folder) else None


def stop_ids(folder: Path) -> frozenset[int]:
    """Return the end-of-document ids in a Hugging Face folder's generation_config.json.

    The set is empty, with a warning, if the file is unusable.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return frozenset()
    try:
        ids = read_json(path).get("eos_token_id")
    except ConfigError as error:
        log.warning("%s; the tokenizer alone says how a document ends", error)
        return frozenset()
    listed = ids if isinstance(ids, list) else [ids]
    known = frozenset(i for i in listed if isinstance(i, int) and not isinstance(i, bool))
    if ids is not None and len(known) < len(set(map(str, listed))):
        log.warning(
            "%s has the eos_token_id %r; values that are not integers are ignored", path, ids
        )
    return known
