"""Write a model as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenyard_models.config import TransformerConfig
from tokenyard_models.families._format import HfFormat
from tokenyard_models.hf._folder import CONFIG, Folder, WeightsError, read_json
from tokenyard_models.hf._folder_map import formats, map_folder
from tokenyard_models.hf._load import checked_map
from tokenyard_models.hf._shards import (
    SHARD_BYTES,
    Report,
    dtypes,
    gather,
    new_folder,
    silent,
    whole_state,
    write_weights,
)
from tokenyard_models.transformer import Transformer

_TRAINING_FIELDS = (
    "auxiliary",
    "expert_parallel",
    "model_type",
    "dense_ffn_dim",
    "moe.rule.jitter",
)
_FORCED_BALANCE = "moe.forced_balance"  # of the key uniform_expert_assignment
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = (
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
"""Files of a tokenizer in a Hugging Face folder."""


@torch.no_grad()
def to_hf(
    model: nn.Module,
    path: Path | str,
    *,
    like: Path | str | None = None,
    dtype: torch.dtype | None = None,
    fused: bool = False,
    shard_bytes: int = SHARD_BYTES,
    report: Report = silent,
) -> None:
    """Write a model as a folder that transformers loads: shards, index and config.json.

    `like` is a folder whose tokenizer, generation settings and token ids are copied. `dtype` is the
    dtype of the weights (default: the parameters' own). `fused` writes one tensor for all experts
    of a layer, if the family has that form. A shard has at most `shard_bytes` bytes; one is in
    memory at a time. `path` must not exist; it appears once everything is written and read back.
    `report` receives the bytes written and their total. Raises WeightsError for a model without a
    Hugging Face format, and for one that transformers would refuse or compute otherwise.
    """
    path = Path(path)
    if path.exists():
        raise WeightsError(f"{path} exists already; give the name of a new folder")
    hf_format = format_to_write(model, fused)
    config: Any = model.config
    published = config_json(hf_format, config)
    state = whole_state(model)
    folder_map = map_folder(hf_format.name, hf_format.rows(fused), config, state)
    with new_folder(path) as folder:
        write_weights(
            folder, folder_map, partial(gather, state), dtypes(state, dtype), shard_bytes, report
        )
        write_config(folder, published, like, dtype or next(iter(state.values())).dtype)
        checked_map(model, Folder(folder), state)


def format_to_write(model: nn.Module, fused: bool = False) -> HfFormat:
    """Return the format to write: that of the folder the model is from, if transformers loads it.

    Otherwise another one of the same definition. Raises WeightsError if there is none. A subclass
    may compute something else than its base, so it has a format only if it sets `definition`.
    """
    definition = getattr(model, "definition", None)
    cls = type(model)
    # fully_shard derives a class of its own from the model's. Importing it here would be slow.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and fsdp.FSDPModule in cls.__bases__:
        cls = cls.__bases__[1]
    if definition is not None and "definition" not in vars(cls):
        raise WeightsError(
            f"{cls.__name__} derives from the {definition} model and may compute something else, "
            f"so it is not written as one; set definition = {definition!r} in it if it does not"
        )
    known = formats().values()
    matching = [hf_format for hf_format in known if hf_format.name == definition]
    if not isinstance(model, Transformer) or not matching:
        names = ", ".join(dict.fromkeys(hf_format.name for hf_format in known))
        raise WeightsError(
            f"a {definition or type(model).__name__} has no Hugging Face form here; "
            f"these have: {names}"
        )
    if fused and not matching[0].fused:
        raise WeightsError(
            f"{definition} has no fused form, with one tensor for all experts in place of many; "
            "drop it"
        )
    config: Any = model.config
    matching.sort(key=lambda hf_format: hf_format.model_type != config.model_type)
    reasons = [hf_format.refuses(config) for hf_format in matching]
    if all(reasons):
        raise WeightsError(f"transformers would not load this {definition}: {reasons[0]}")
    return matching[reasons.index(None)]


def config_json(hf_format: HfFormat, config: TransformerConfig) -> dict[str, Any]:
    """Return a model's config.json.

    Raises WeightsError if reading it back would give a model that computes something else.
    """
    published = hf_format.config_json(config)
    section = hf_format.section(published)
    read_back = computed_fields(asdict(hf_format.definition.resolve(section)))
    check_read_back(hf_format.name, computed_fields(asdict(config)), read_back)
    return published


def check_read_back(name: str, fields: Mapping[str, Any], read_back: Mapping[str, Any]) -> None:
    """Raise WeightsError for the first field that reads back as another value.

    `name` is that of the format.
    """
    if fields.get(_FORCED_BALANCE) and not read_back.get(_FORCED_BALANCE):
        raise WeightsError(
            f"a {name} folder cannot say that uniform_expert_assignment is True, only False; give "
            "a model that was trained without it, by its own router"
        )
    for field, value in fields.items():
        if read_back.get(field) != value:
            raise WeightsError(
                f"a {name} folder cannot say that {field} is {value!r}, "
                f"only {read_back.get(field)!r}"
            )


def computed_fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields that decide what a model computes, without those of training."""
    fields: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix + key
        if name.startswith(_TRAINING_FIELDS):
            continue
        nested = isinstance(value, Mapping)
        fields |= computed_fields(value, f"{name}.") if nested else {name: value}
    return fields


def write_config(
    folder: Path, config: dict[str, Any], like: Path | str | None, dtype: torch.dtype
) -> None:
    """Write config.json and generation_config.json.

    Takes the token ids from `like` and copies its tokenizer.
    """
    # null where unknown: transformers' defaults are ids of other vocabularies.
    tokens: dict[str, Any] = dict.fromkeys(_TOKENS)
    if like is not None:
        source = Path(like)
        source_config = read_json(source / CONFIG) if (source / CONFIG).exists() else {}
        tokens |= {key: source_config[key] for key in _TOKENS if key in source_config}
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)
    dtype_name = str(dtype).removeprefix("torch.")
    config = tokens | config | {"dtype": dtype_name, "torch_dtype": dtype_name}
    _write_json(folder / CONFIG, config, sort_keys=True)
    generation = folder / "generation_config.json"
    if not generation.exists():
        ids = {key: config[key] for key in _TOKENS if config.get(key) is not None}
        _write_json(generation, ids)


def _write_json(path: Path, content: Mapping[str, Any], sort_keys: bool = False) -> None:
    text = json.dumps(content, indent=2, sort_keys=sort_keys)
    path.write_text(text + "\n", encoding="utf-8")
