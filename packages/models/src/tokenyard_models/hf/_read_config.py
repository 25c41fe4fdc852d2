"""Read a folder's config.json: the format, the `model:` section, the dtype of the weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenyard.errors import did_you_mean
from tokenyard_models.families._format import HfFormat
from tokenyard_models.hf._folder import CONFIG, Folder, WeightsError, read_json
from tokenyard_models.hf._folder_map import formats
from tokenyard_models.hf._sizes import check_sizes

log = logging.getLogger("tokenyard")

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_WINDOW = (
    "%s attends within windows of %d tokens, which is not supported: it is read as a model of %d "
    "positions, which computes the same for texts up to that length"
)

_UNKNOWN = "%s has keys that are not known here and are left out: %s"


class DescribedModel(NamedTuple):
    """What a folder's config.json says of a model."""

    name: str  # of the definition
    section: dict[str, Any]  # the keys of its `model:` section
    renamed: Mapping[str, str]  # key of config.json -> key of the section
    modules: dict[str, tuple[str, ...]]  # name pattern of a weight -> its modules in transformers


def described_model(path: Path) -> DescribedModel:
    """Read a folder's config.json alone; weights need not be there. Raises WeightsError.

    See `model_section` for windows.
    """
    config = read_json(path / CONFIG)
    hf_format = _format_of(config, path)
    modules = {
        row.parameter.replace("{layer}", "*"): tuple(k.removesuffix(".weight") for k in row.keys)
        for row in hf_format.rows(fused=True)
        if all(key.endswith(".weight") for key in row.keys)
    }
    section = _section(hf_format, config, path)
    return DescribedModel(hf_format.name, section, hf_format.renamed, modules)


def model_section(folder: Folder) -> tuple[str, dict[str, Any]]:
    """Return the name of a folder's definition and the keys of its `model:` section.

    A sliding-window model is read with max_seq_len = window, where both compute the same; a
    warning says so. Raises WeightsError for an unknown architecture, and for sizes that the files
    do not have, before anything of those sizes is built.
    """
    hf_format = format_of(folder)
    section = _section(hf_format, folder.config, folder.path)
    check_sizes(folder, hf_format, section)
    return hf_format.name, section


def _section(hf_format: HfFormat, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    unknown: list[str] = []
    section = hf_format.section(config, unknown)
    if unknown:
        log.warning(_UNKNOWN, path / CONFIG, ", ".join(unknown))
    window = section.get("sliding_window")
    length = section.get("max_position_embeddings")
    if (
        _always_windowed(hf_format)
        and isinstance(window, int)
        and isinstance(length, int)
        and window < length
    ):
        log.warning(_WINDOW, path, window, window)
        section["max_seq_len"] = window
    return section


def _always_windowed(hf_format: HfFormat) -> bool:
    """Return whether `sliding_window` alone sets a window, without `use_sliding_window`."""
    return "use_sliding_window" not in hf_format.definition.schema.model_fields


def dtype_of(folder: Folder) -> torch.dtype:
    """Return the dtype that config.json names, or else the dtype of the first tensor.

    Raises WeightsError for an unknown dtype.
    """
    name = folder.config.get("dtype") or folder.config.get("torch_dtype")
    # Folder.check reports a stored dtype that is unknown here.
    name = name or _STORED.get(folder.stored_dtype(), "float32")
    if not isinstance(name, str) or name not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise WeightsError(
            f"{folder.path / 'config.json'} has dtype {name!r}; weights are read in: {known}"
        )
    return _DTYPES[name]


def checked_dtype_of(folder: Folder) -> torch.dtype:
    """Return `dtype_of`, with a warning that names tensors which lose precision in that dtype."""
    dtype = dtype_of(folder)
    wider = folder.stored_wider(dtype.itemsize)
    if wider:
        log.warning(
            "%s has dtype %s, and %d tensors are wider, such as %s: they are rounded; "
            "set dtype in config.json to keep them",
            folder.path / CONFIG,
            str(dtype).removeprefix("torch."),
            len(wider),
            wider[0],
        )
    return dtype


def format_of(folder: Folder) -> HfFormat:
    """Return a folder's format. Raises WeightsError for an unknown architecture."""
    return _format_of(folder.config, folder.path)


def _format_of(config: Mapping[str, Any], path: Path) -> HfFormat:
    model_type = config.get("model_type")
    known = formats()
    if not isinstance(model_type, str) or model_type not in known:
        hint = did_you_mean(model_type, known) if isinstance(model_type, str) else ""
        raise WeightsError(
            f"{path / CONFIG} has model_type {model_type!r}{hint}; give a model of one of these: "
            f"{', '.join(known)}"
        )
    return known[model_type]
