"""A dense model's folder becomes one of a model with experts, which computes the same before it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenyard_models.config import TransformerConfig
from tokenyard_models.families._boxes import Piece
from tokenyard_models.hf._families import FAMILIES, Family, layout_of
from tokenyard_models.hf._folder import Folder, WeightsError
from tokenyard_models.hf._load import checked_layout, fill
from tokenyard_models.hf._read_config import dtype_of, family_of, model_section
from tokenyard_models.hf._save import config_json, write_config
from tokenyard_models.hf._shards import SHARD_BYTES, dtypes, new_folder, write_weights
from tokenyard_models.transformer import Transformer
from tokenyard_models.upcycling import Upcycling

_ROUTER, _UP, _DOWN = "ffn.router.weight", "ffn.experts.up", "ffn.experts.down"


@torch.no_grad()
def upcycle(
    source: Path | str, target: Path | str, how: Upcycling, *, shard_bytes: int = SHARD_BYTES
) -> Transformer:
    """Write a dense model's Hugging Face folder as one with experts: llama and mistral as mixtral, qwen3 as qwen3_moe.

    One layer's experts and a shard, as tensors and as bytes, are in memory at a time. Returns the new model on the meta
    device, without weights. The folder must not exist; it does when all is written. Raises WeightsError for a folder
    that is not whole or not dense, ConfigError for numbers that do not go together.
    """
    target = Path(target)
    if target.exists():
        raise WeightsError(f"{target} exists already; give the name of a new folder")
    folder = Folder(source)
    family, dense = _with_experts(folder), _on_meta(folder)
    config = _config(dense.config, family, how)
    published = config_json(family, config)
    with torch.device("meta"):
        model: Transformer = family.definition(family.section(published))
    parameters, dtype = dict(model.named_parameters()), dtype_of(folder)
    layout = layout_of(family.model, family.table, config, parameters)
    parameter = partial(_parameter, how, _reading(dense, folder, dtype))
    with new_folder(target) as unfinished:
        write_weights(unfinished, layout, parameter, dtypes(parameters, dtype), shard_bytes)
        write_config(unfinished, published, source, dtype)
    return model


def _with_experts(folder: Folder) -> Family:
    family = family_of(folder)
    if not family.upcycled:
        dense = ", ".join(name for name, other in FAMILIES.items() if other.upcycled)
        raise WeightsError(
            f"{folder.path} holds a {family.model}, which has experts; upcycled are: {dense}"
        )
    return FAMILIES[family.upcycled]


def _on_meta(folder: Folder) -> Any:
    with torch.device("meta"):
        return family_of(folder).definition(model_section(folder)[1])


def _config(dense: TransformerConfig, family: Family, how: Upcycling) -> TransformerConfig:
    usual = family.definition.resolve({}).auxiliary
    return replace(dense, moe=how.experts_of(dense.dense_width), auxiliary=usual)


def _reading(dense: Transformer, folder: Folder, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Return what reads a parameter of the dense model, by our name."""
    parameters = dict(dense.named_parameters())
    files = {key: name for name, keys in folder.files.items() for key in keys}
    pieces: dict[str, list[Piece]] = {}
    for found in checked_layout(dense, folder, parameters).values():
        for name, piece in found:
            pieces.setdefault(name, []).append(piece)

    def read(name: str) -> Tensor:
        parameter = torch.empty(parameters[name].shape, dtype=dtype)
        for piece in pieces[name]:
            fill(parameter, piece, folder.reader(files[piece.key]))
        return parameter

    return read


def _parameter(how: Upcycling, dense: Callable[[str], Tensor], name: str) -> Tensor:
    """Return a parameter of the model with experts."""
    if name.endswith(_UP):
        return how.up(dense(name.removesuffix(_UP) + "ffn.up"))
    if name.endswith(_DOWN):
        return how.down(dense(name.removesuffix(_DOWN) + "ffn.down"))
    if name.endswith(_ROUTER):
        return how.router(name, dense(name.removesuffix(_ROUTER) + "norm_2.weight").numel())
    return dense(name)
