"""Take the model section of a config from the Hugging Face folder that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenyard import ConfigError
from tokenyard_models.hf import Folder, model_section

HF = "hf://"
_LENGTH_KEYS = ("max_seq_len", "max_position_embeddings")
_DEFAULT_LENGTH = 1024  # tokens per sample, unless the model's limit is lower


def with_hf_model(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose `model` section comes from the folder at `load_path`, if hf://.

    The config's own keys override the folder's. Raises ConfigError if the config names another
    model, and WeightsError if the folder is unusable.
    """
    path = data.get("load_path")
    overrides = data.get("model", {})
    if not isinstance(path, str) or not path.startswith(HF) or not isinstance(overrides, Mapping):
        return dict(data)
    name, section = model_section(Folder(path.removeprefix(HF)))
    if overrides.get("name", name) != name:
        raise ConfigError(
            f"model.name is {overrides['name']!r} but load_path {path!r} holds a {name}; "
            "drop the name"
        )
    lengths = [section[key] for key in _LENGTH_KEYS if isinstance(section.get(key), int)]
    length = min(lengths or [_DEFAULT_LENGTH])
    model = {"max_seq_len": length} | section | dict(overrides) | {"name": name}
    return {"max_seq_len": min(length, _DEFAULT_LENGTH)} | dict(data) | {"model": model}
