"""Map each tensor of a Hugging Face folder to boxes of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from tokenyard_models.config import TransformerConfig
from tokenyard_models.families import FAMILIES, load_module
from tokenyard_models.families._boxes import Piece
from tokenyard_models.families._format import HfFormat, Row
from tokenyard_models.hf._folder import Folder, WeightsError

FolderMap = dict[str, list[tuple[str, Piece]]]
"""Tensor of the folder, in order -> its parts as (parameter, piece)."""


def formats() -> dict[str, HfFormat]:
    """Return the format of each `model_type` that a family of this package has."""
    modules = [load_module(name) for name in FAMILIES]
    return {
        hf_format.model_type: hf_format
        for module in modules
        for hf_format in getattr(module, "FORMATS", ())
    }


def rows_of(hf_format: HfFormat, folder: Folder) -> list[Row]:
    """Return the weight table of a folder: the published form, or the fused one."""
    suffix = hf_format.fused_suffix
    return hf_format.rows(bool(suffix) and any(key.endswith(suffix) for key in folder.keys))


def map_folder(
    name: str, rows: Iterable[Row], config: TransformerConfig, parameters: Mapping[str, Tensor]
) -> FolderMap:
    """Build the map from a weight table. `name` is that of the format, for errors.

    Raises WeightsError for a parameter that the table lacks.
    """
    folder_map: FolderMap = {}
    mapped: set[str] = set()
    for row in rows:
        for layer in range(config.layers) if "{layer}" in row.parameter else [0]:
            parameter = row.parameter.replace("{layer}", str(layer))
            if parameter not in parameters:
                continue
            keys = [key.replace("{layer}", str(layer)) for key in row.keys]
            for piece in row.operation(keys, tuple(parameters[parameter].shape), config):
                folder_map.setdefault(piece.key, []).append((parameter, piece))
            mapped.add(parameter)
    if unmapped := sorted(parameters.keys() - mapped):
        raise WeightsError(f"the model's {unmapped[0]} has no place in a {name} folder")
    return folder_map
