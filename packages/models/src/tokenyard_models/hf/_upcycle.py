"""Upcycle a dense model's folder into a folder with experts.

Before training, the new model computes the same function.
"""

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
from tokenyard_models.families._format import HfFormat
from tokenyard_models.hf._folder import Folder, WeightsError
from tokenyard_models.hf._folder_map import formats, map_folder
from tokenyard_models.hf._load import checked_map, fill
from tokenyard_models.hf._read_config import checked_dtype_of, format_of, model_section
from tokenyard_models.hf._save import config_json, write_config
from tokenyard_models.hf._shards import (
    SHARD_BYTES,
    Report,
    dtypes,
    new_folder,
    silent,
    write_weights,
)
from tokenyard_models.transformer import Transformer
from tokenyard_models.upcycling import Upcycling

_ROUTER = "ffn.router.weight"
_UP = "ffn.experts.up"
_DOWN = "ffn.experts.down"


@torch.no_grad()
def upcycle(
    source: Path | str,
    target: Path | str,
    upcycling: Upcycling,
    *,
    shard_bytes: int = SHARD_BYTES,
    report: Report = silent,
) -> Transformer:
    """Write a dense Hugging Face folder as one with experts.

    llama and mistral become mixtral; qwen3 becomes qwen3_moe. The experts of one layer and a shard,
    as tensors and as bytes, are in memory at a time. `target` must not exist; it appears once
    everything is written. `report` receives the bytes written and their total. Returns the new
    model on the meta device, without weights. Raises WeightsError if the source is incomplete or
    not dense, and ConfigError for numbers that contradict each other.
    """
    target = Path(target)
    if target.exists():
        raise WeightsError(f"{target} exists already; give the name of a new folder")
    folder = Folder(source)
    hf_format = _format_with_experts(folder)
    dense = _on_meta(folder)
    config = _config(dense.config, hf_format, upcycling)
    published = config_json(hf_format, config)
    with torch.device("meta"):
        model: Transformer = hf_format.definition(hf_format.section(published))
    parameters = dict(model.named_parameters())
    dtype = checked_dtype_of(folder)
    folder_map = map_folder(hf_format.name, hf_format.weights, config, parameters)
    parameter = partial(_parameter, upcycling, _dense_reader(dense, folder, dtype))
    with new_folder(target) as unfinished:
        widths = dtypes(parameters, dtype)
        write_weights(unfinished, folder_map, parameter, widths, shard_bytes, report)
        write_config(unfinished, published, source, dtype)
        checked_map(model, Folder(unfinished), parameters)
    return model


def _format_with_experts(folder: Folder) -> HfFormat:
    hf_format = format_of(folder)
    known = formats()
    if not hf_format.upcycled:
        dense = ", ".join(name for name, other in known.items() if other.upcycled)
        raise WeightsError(
            f"{folder.path} holds a {hf_format.name}, which has experts; upcycled are: {dense}"
        )
    return known[hf_format.upcycled]


def _on_meta(folder: Folder) -> Any:
    with torch.device("meta"):
        return format_of(folder).definition(model_section(folder)[1])


def _config(
    dense: TransformerConfig, hf_format: HfFormat, upcycling: Upcycling
) -> TransformerConfig:
    moe = upcycling.experts_of(dense.dense_width)
    auxiliary = hf_format.definition.resolve({}).auxiliary
    return replace(dense, moe=moe, auxiliary=auxiliary)


def _dense_reader(
    dense: Transformer, folder: Folder, dtype: torch.dtype
) -> Callable[[str], Tensor]:
    """Return a function that reads a parameter of the dense model by name."""
    parameters = dict(dense.named_parameters())
    files = {key: name for name, keys in folder.files.items() for key in keys}
    pieces: dict[str, list[Piece]] = {}
    for parts in checked_map(dense, folder, parameters).values():
        for name, piece in parts:
            pieces.setdefault(name, []).append(piece)

    def read(name: str) -> Tensor:
        parameter = torch.empty(parameters[name].shape, dtype=dtype)
        for piece in pieces[name]:
            fill(parameter, piece, folder.reader(files[piece.key]))
        return parameter

    return read


def _parameter(upcycling: Upcycling, dense: Callable[[str], Tensor], name: str) -> Tensor:
    """Return a parameter of the model with experts; `dense` reads one of the dense model."""
    if name.endswith(_UP):
        return upcycling.up(dense(name.removesuffix(_UP) + "ffn.up"))
    if name.endswith(_DOWN):
        return upcycling.down(dense(name.removesuffix(_DOWN) + "ffn.down"))
    if name.endswith(_ROUTER):
        dim = dense(name.removesuffix(_ROUTER) + "norm_2.weight").numel()
        return upcycling.router(name, dim)
    return dense(name)
