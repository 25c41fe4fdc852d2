"""Load a Hugging Face folder into a model, one tensor at a time.

Of a sharded model, each rank reads only its shards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenyard import Registry, default_registry
from tokenyard.draw import unwrapped
from tokenyard.sharded import allocate, local_shard
from tokenyard_models.families._boxes import Piece, slices
from tokenyard_models.hf._folder import CONFIG, Folder, Reader, WeightsError
from tokenyard_models.hf._folder_map import FolderMap, map_folder, rows_of
from tokenyard_models.hf._read_config import checked_dtype_of, format_of, model_section
from tokenyard_models.hf._values import check_cast
from tokenyard_models.transformer import Transformer

log = logging.getLogger("tokenyard")

HEAD = "lm_head.weight"
_ROWS = 4096  # of a head, compared at a time
_DERIVED = ("rotary_emb.inv_freq",)  # in older files, though config.json determines it


def from_hf(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    registry: Registry | None = None,
    **placement: Any,
) -> Any:
    """Load the model of a Hugging Face folder, with its weights.

    `dtype` is the dtype of the parameters (default: the folder's). `compute_dtype` is the dtype
    that the experts compute in (default: `dtype`); set it to use the model under autocast.
    `placement` holds other arguments of Transformer, such as `backends`. Raises WeightsError for an
    incomplete folder or an unknown architecture, and ConfigError for an unsupported feature.
    """
    folder = Folder(path)
    name, section = model_section(folder)
    dtype = dtype or checked_dtype_of(folder)
    backend = (registry or default_registry()).choose("model", name)
    placement |= {
        "device": device,
        "dtype": dtype,
        "compute_dtype": compute_dtype or dtype,
        "registry": registry,
    }
    with torch.device("meta"):
        model = backend.construct(section, **placement)
    checked_map(model, folder, _loaded(model))  # before memory is taken
    allocate(model, device)
    for buffer in model.buffers():
        buffer.zero_()
    load_weights(model, folder)
    return model


@torch.no_grad()
def load_weights(model: nn.Module, folder: Folder) -> None:
    """Fill a model's parameters, except adapters, from a folder.

    Of a sharded model, each rank reads its shards. Raises WeightsError for a tensor that is
    missing, left over, or of another shape, before it changes any parameter.
    """
    fill_from(model, folder, partial(_map, model, folder))


def fill_from(
    model: nn.Module, folder: Folder, map_of: Callable[[Mapping[str, Tensor]], FolderMap]
) -> None:
    """Fill a model's parameters by the map of a folder, which `map_of` makes of the parameters.

    Raises WeightsError unless the folder holds the tensors of the map.
    """
    parameters = _loaded(model)
    folder_map = map_of(parameters)
    check_tensors(folder, folder_map)
    not_finite: list[str] = []
    for file_name, keys in folder.files.items():
        reader = folder.reader(file_name)
        for key in keys:
            for name, piece in folder_map.get(key, []):
                if not fill(parameters[name], piece, reader):
                    not_finite.append(key)
    if not_finite:
        log.warning("%s holds nan or inf%s", not_finite[0], _in_folder(folder, not_finite))


def _loaded(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that a folder fills, by name: all except adapters."""
    return {unwrapped(name): p for name, p in model.named_parameters() if ".adapter." not in name}


def _in_folder(folder: Folder, keys: list[str]) -> str:
    others = len(set(keys)) - 1
    return f" in {folder.path}" + (f", and so do {others} other tensors" if others else "")


def fill(parameter: Tensor, piece: Piece, reader: Reader) -> bool:
    """Read a piece into a parameter; of a sharded one, the part that this rank holds.

    Returns whether all values are finite. Raises WeightsError for finite ones that are infinite in
    the dtype of the parameter.
    """
    shard, offsets = local_shard(parameter)
    box = tuple((offset, offset + size) for offset, size in zip(offsets, shard.shape))
    part = piece.within(box)
    if part is None:
        return True
    tensor = part.orient(reader.read(part.key, slices(part.file_box)))
    finite = check_cast(
        tensor,
        parameter.dtype,
        f"{part.key} in {reader.path}",
        "read it in another dtype: by dtype in config.json, or --dtype of convert",
    )
    local_box = tuple((a - offset, b - offset) for (a, b), offset in zip(part.box, offsets))
    target = shard[slices(local_box)]
    target.copy_(tensor.reshape(target.shape))
    return finite


def checked_map(model: Any, folder: Folder, parameters: Mapping[str, Tensor]) -> FolderMap:
    """Map a folder's tensors to a model's parameters. Raises WeightsError unless they match."""
    folder_map = _map(model, folder, parameters)
    check_tensors(folder, folder_map)
    return folder_map


def _map(model: Any, folder: Folder, parameters: Mapping[str, Tensor]) -> FolderMap:
    hf_format = format_of(folder)
    if not isinstance(model, Transformer) or model.definition != hf_format.name:
        other = getattr(model, "definition", type(model).__name__)
        raise WeightsError(f"{folder.path} holds a {hf_format.name}, and the model is {other}")
    return map_folder(hf_format.name, rows_of(hf_format, folder), model.config, parameters)


def check_tensors(folder: Folder, folder_map: FolderMap) -> None:
    """Raise WeightsError unless a folder holds the tensors of a map, in their shapes."""
    left_over = {key for key in folder.keys - folder_map.keys() if not key.endswith(_DERIVED)}
    tied = "head.weight" not in {name for parts in folder_map.values() for name, _ in parts}
    if tied:
        left_over.discard(HEAD)  # some folders store a tied head too
    if missing := sorted(folder_map.keys() - folder.keys):
        raise WeightsError(f"{folder.path} lacks {missing[0]}{_and_others(missing)}")
    if left_over:
        extra = sorted(left_over)
        raise WeightsError(
            f"{folder.path} holds {extra[0]}{_and_others(extra)}, which the model has no use for"
        )
    for name, keys in folder.files.items():
        file = folder.reader(name).file
        for key in keys:
            if key in folder_map:
                folder.check(key, folder_map[key][0][1].shape, file, name)
    if tied:
        _check_tied_head(folder, folder_map)


def _check_tied_head(folder: Folder, folder_map: FolderMap) -> None:
    """Raise WeightsError if a stored head differs from the embedding that it is tied to.

    transformers does not tie such a head, whatever config.json says.
    """
    files = {key: name for name, keys in folder.files.items() for key in keys}
    (embedding,) = (key for key, parts in folder_map.items() if parts[0][0] == "embed.weight")
    if HEAD not in files:
        return
    head, embed = (folder.reader(files[key]).file.get_slice(key) for key in (HEAD, embedding))
    shape = head.get_shape()
    starts = range(0, shape[0], _ROWS)
    if shape != embed.get_shape() or not all(
        torch.equal(head[start : start + _ROWS].float(), embed[start : start + _ROWS].float())
        for start in starts
    ):
        raise WeightsError(
            f"{folder.path / CONFIG} has tie_word_embeddings true, and {HEAD} has other values "
            f"than {embedding}; set tie_word_embeddings to false, or remove {HEAD}"
        )


def _and_others(names: list[str]) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""
