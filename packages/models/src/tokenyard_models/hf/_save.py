"""Writing a model as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenyard_models.config import TransformerConfig
from tokenyard_models.hf._families import FAMILIES, Family, layout_of
from tokenyard_models.hf._folder import CONFIG, WeightsError, read_json
from tokenyard_models.hf._shards import SHARD_BYTES, dtypes, gathered, new_folder, write_weights
from tokenyard_models.init_weights import unwrapped
from tokenyard_models.transformer import Transformer

_OF_TRAINING = (
    "auxiliary",
    "expert_parallel",
    "moe.forced_balance",
    "dense_ffn_dim",
    "moe.rule.jitter",
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "chat_template.jinja",
)
"""What belongs to a model's text, and goes from folder to folder as it is."""


@torch.no_grad()
def to_hf(
    model: nn.Module,
    path: Path | str,
    *,
    like: Path | str | None = None,
    dtype: torch.dtype | None = None,
    fused: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model as a folder that transformers loads: shards of at most `shard_bytes`, index, config.json.

    `like` is a folder whose tokenizer, generation settings and token ids go along; `dtype` is that of the weights, left
    out the parameters' own; `fused` writes one tensor for all experts of a layer where the family has such a form.
    A shard is put together at a time. The folder must not exist; it does when all is written. Raises WeightsError for a
    model of no such family.
    """
    path = Path(path)
    if path.exists():
        raise WeightsError(f"{path} exists already; give the name of a new folder")
    family = _family(model, fused)
    parameters = {unwrapped(name): p for name, p in model.named_parameters()}
    config: Any = model.config
    layout = layout_of(family.model, family.entries(fused), config, parameters)
    published = config_json(family, config)
    with new_folder(path) as folder:
        write_weights(
            folder, layout, partial(gathered, parameters), dtypes(parameters, dtype), shard_bytes
        )
        write_config(folder, published, like, dtype or next(iter(parameters.values())).dtype)


def _family(model: nn.Module, fused: bool) -> Family:
    definition = getattr(model, "definition", None)
    found = [family for family in FAMILIES.values() if family.model == definition]
    if not isinstance(model, Transformer) or not found:
        known = ", ".join(dict.fromkeys(family.model for family in FAMILIES.values()))
        raise WeightsError(
            f"a {definition or type(model).__name__} has no Hugging Face form here; these have: {known}"
        )
    if fused and not found[0].fused:
        raise WeightsError(
            f"{definition} has no fused form, with one tensor for all experts in place of many; drop it"
        )
    return found[0]


def config_json(family: Family, config: TransformerConfig) -> dict[str, Any]:
    """Return a model's config.json. Raises WeightsError for what it cannot say: whoever reads it would err."""
    published = family.publish(config)
    told, meant = (
        _computed(asdict(c)) for c in (family.definition.resolve(family.section(published)), config)
    )
    for name, value in meant.items():
        if told.get(name) != value:
            raise WeightsError(
                f"a {family.model} folder cannot say that {name} is {value!r}, only {told.get(name)!r}"
            )
    return published


def _computed(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return, by name, what decides what a model computes; not how it is trained."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = where + key
        if not name.startswith(_OF_TRAINING):
            found |= _computed(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def write_config(
    folder: Path, config: dict[str, Any], like: Path | str | None, dtype: torch.dtype
) -> None:
    """Write config.json and generation_config.json, with the token ids of `like`, and copy its tokenizer."""
    if like is not None:
        theirs = read_json(Path(like) / CONFIG) if (Path(like) / CONFIG).exists() else {}
        config = {key: theirs[key] for key in _TOKENS if key in theirs} | config
        for name in _BESIDE:
            if (Path(like) / name).is_file():
                shutil.copy(Path(like) / name, folder / name)
    config |= {
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / CONFIG).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    if not (folder / "generation_config.json").exists():
        ids = {key: config[key] for key in _TOKENS if config.get(key) is not None}
        (folder / "generation_config.json").write_text(
            json.dumps(ids, indent=2) + "\n", encoding="utf-8"
        )
