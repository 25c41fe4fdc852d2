"""Take model and tokenizer of a config from the Hugging Face folder that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenyard import ConfigError, default_registry
from tokenyard_models.hf import Folder, PeftFolder, is_hf_folder, is_peft, model_section
from tokenyard_models.strict_config import merged
from tokenyard_train.checkpoint import checkpoints, is_checkpoint, read_meta
from tokenyard_train.config.comparable import comparable_config
from tokenyard_train.data.paths import HF

_LENGTH_KEYS = ("max_seq_len", "max_position_embeddings")
_DEFAULT_LENGTH = 1024  # tokens per sample, unless the model's limit is lower


def with_hf_model(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the model and the tokenizer of the folder at `load_path`.

    A folder with a config.json is one of Hugging Face, also without hf:// before it. A run is read
    too, if the config has no model. The config's own keys override the folder's. Raises ConfigError
    if the config names another model, or if neither it nor the folder has a tokenizer, and
    WeightsError if the folder is unusable.
    """
    path = data.get("load_path")
    if not isinstance(path, str):
        return dict(data)
    folder = Path(path.removeprefix(HF)).expanduser()
    if is_peft(folder):
        return _with_peft_adapters(data, folder)
    overrides = data.get("model", {})
    if not isinstance(overrides, Mapping):
        return dict(data)
    if not path.startswith(HF) and not is_hf_folder(folder):
        return _with_run_model(data, folder)
    name, section = model_section(Folder(folder))
    if overrides.get("name", name) != name:
        raise ConfigError(
            f"model.name is {overrides['name']!r} but load_path {path!r} holds a {name}; "
            "drop the name"
        )
    section = section_with_length(section)
    length = section["max_seq_len"]
    model = merged(section, overrides) | {"name": name}
    taken = {
        "load_path": f"{HF}{folder}",
        "model": model,
        "tokenizer": _tokenizer(data.get("tokenizer", {}), folder),
    }
    return {"max_seq_len": min(length, _DEFAULT_LENGTH)} | dict(data) | taken


def _with_run_model(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a config without a `model` with what it starts from: a run or a checkpoint.

    Model, tokenizer, length and adapters are those of the newest checkpoint, unless the config has
    its own. Raises CheckpointError if that has no usable metadata.
    """
    found = [folder] if is_checkpoint(folder) else checkpoints(folder)
    if "model" in data or not found:
        return dict(data)
    saved = comparable_config(read_meta(found[-1])["config"])
    keys = ("model", "tokenizer", "max_seq_len", "lora")
    return {key: saved[key] for key in keys if saved.get(key) is not None} | dict(data)


def section_with_length(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a folder's `model:` section with a max_seq_len."""
    lengths = [section[key] for key in _LENGTH_KEYS if isinstance(section.get(key), int)]
    return {**section, "max_seq_len": min(lengths or [_DEFAULT_LENGTH])}


def _with_peft_adapters(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a config with the model, the tokenizer and the adapters of PEFT's folder."""
    adapters = PeftFolder(path)
    taken = with_hf_model({**data, "load_path": f"{HF}{adapters.base}"})
    section = {key: value for key, value in taken["model"].items() if key != "name"}
    with torch.device("meta"):
        backend = default_registry().choose("model", taken["model"]["name"])
        model = backend.construct(section)
    settings = adapters.settings
    lora = {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "dropout": settings.dropout,
        "use_rslora": settings.rank_stabilized,
        "targets": adapters.targets(model),
    }
    given = data.get("lora") or {}
    if any(given.get(key, value) != value for key, value in lora.items() if key != "dropout"):
        raise ConfigError(f"lora differs from the adapters in load_path {str(path)!r}; drop it")
    return taken | {"load_path": str(path), "lora": lora | given}


def _tokenizer(section: Any, folder: Path) -> Any:
    """Return the config's `tokenizer`, by default the folder's own."""
    if not isinstance(section, Mapping) or "name" in section:
        return section
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"load_path {str(folder)!r} has no tokenizer.json, and the config names no tokenizer; "
            "give tokenizer.name, the path of a tokenizer.json, tiktoken or bytes"
        )
    return {"name": str(folder)} | dict(section)
