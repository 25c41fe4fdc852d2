"""What a folder's config.json tells of a model: its family, its keys, the dtype of its weights."""

from __future__ import annotations

import logging
from typing import Any

import torch

from tokenyard.errors import did_you_mean
from tokenyard_models.hf._families import FAMILIES, Family
from tokenyard_models.hf._folder import Folder, WeightsError

log = logging.getLogger("tokenyard")

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_WINDOW = (
    "%s attends within windows of %d tokens, which is not supported: it is read as a model of %d positions, which "
    "computes the same for texts up to that length"
)


def model_section(folder: Folder) -> tuple[str, dict[str, Any]]:
    """Return a folder's model as a config's `model:` section tells it: its name, and its keys.

    One that attends within windows is told as one of no more positions than a window has, to which it is the same; a
    warning says so. Raises WeightsError for an architecture that is not known here.
    """
    family = family_of(folder)
    section = family.section(folder.config)
    window, length = section.get("sliding_window"), section.get("max_position_embeddings")
    if (
        _always_windowed(family)
        and isinstance(window, int)
        and isinstance(length, int)
        and window < length
    ):
        log.warning(_WINDOW, folder.path, window, window)
        section["max_seq_len"] = window
    return family.model, section


def _always_windowed(family: Family) -> bool:
    """Say whether a `sliding_window` means one by itself; elsewhere `use_sliding_window` has to say so, too."""
    return "use_sliding_window" not in family.definition.schema.model_fields


def dtype_of(folder: Folder) -> torch.dtype:
    """Return the dtype of the weights that config.json tells; if it tells none, that of the first tensor in the files.

    Raises WeightsError for one that is not known here.
    """
    told = folder.config.get("dtype") or folder.config.get("torch_dtype")
    told = told or _STORED.get(folder.stored_dtype(), "float32")  # of another, check() tells
    if not isinstance(told, str) or told not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise WeightsError(
            f"{folder.path / 'config.json'} has dtype {told!r}; weights are read in: {known}"
        )
    return _DTYPES[told]


def family_of(folder: Folder) -> Family:
    """Return a folder's family. Raises WeightsError for an architecture that is not known here."""
    kind = folder.config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        hint = did_you_mean(kind, FAMILIES) if isinstance(kind, str) else ""
        raise WeightsError(
            f"{folder.path / 'config.json'} has model_type {kind!r}{hint}; known are: {known}"
        )
    return FAMILIES[kind]
