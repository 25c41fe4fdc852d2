"""A config that begins with a Hugging Face folder need not say what model it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenyard import ConfigError
from tokenyard_models.hf import Folder, model_section

HF = "hf://"
_LENGTHS = ("max_seq_len", "max_position_embeddings")
_USUAL = 1024  # tokens of a sample, where the model would take more


def with_published_model(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose `model` is that of the folder that `load_path` names by hf://, with what is given besides.

    Raises ConfigError if another model is named, WeightsError for a folder that is none.
    """
    path, given = data.get("load_path"), data.get("model", {})
    if not isinstance(path, str) or not path.startswith(HF) or not isinstance(given, Mapping):
        return dict(data)
    name, section = model_section(Folder(path.removeprefix(HF)))
    if given.get("name", name) != name:
        raise ConfigError(
            f"model.name is {given['name']!r} but load_path {path!r} holds a {name}; drop the name"
        )
    length = min(
        [section[key] for key in _LENGTHS if isinstance(section.get(key), int)] or [_USUAL]
    )
    model = {"max_seq_len": length} | section | dict(given) | {"name": name}
    return {"max_seq_len": min(length, _USUAL)} | dict(data) | {"model": model}
