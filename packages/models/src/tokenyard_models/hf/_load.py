"""Reading a Hugging Face folder into a model: tensor by tensor, and of a sharded model only what this rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenyard import Registry, default_registry
from tokenyard.sharded import allocate
from tokenyard_models.families._boxes import Piece, slices
from tokenyard_models.hf._families import Layout, layout_of
from tokenyard_models.hf._folder import Folder, Reader, WeightsError
from tokenyard_models.hf._read_config import dtype_of, family_of, model_section
from tokenyard_models.init_weights import unwrapped
from tokenyard_models.sharding import own_part
from tokenyard_models.transformer import Transformer

_COMPUTED = ("rotary_emb.inv_freq",)  # what older files hold, though it follows from config.json


def from_hf(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    registry: Registry | None = None,
    **placement: Any,
) -> Any:
    """Return the model of a Hugging Face folder of one of FAMILIES, with its weights.

    `dtype` is that of the parameters; left out, the one that config.json tells. `compute_dtype` is what the experts
    compute in, by default `dtype`: give another one to use the model under autocast. `placement` is the rest that
    Transformer takes, such as `backends`. Raises WeightsError for a folder that is not whole, or of another
    architecture, and ConfigError for a feature that is not supported; each names it.
    """
    folder = Folder(path)
    name, section = model_section(folder)
    dtype = dtype or dtype_of(folder)
    chosen = (registry or default_registry()).choose("model", name)
    placement |= {
        "device": device,
        "dtype": dtype,
        "compute_dtype": compute_dtype or dtype,
        "registry": registry,
    }
    with torch.device("meta"):
        model = chosen.construct(section, **placement)
    allocate(model, device)
    for buffer in model.buffers():
        buffer.zero_()
    load_weights(model, folder)
    return model


@torch.no_grad()
def load_weights(model: nn.Module, folder: Folder) -> None:
    """Fill a model's parameters, but for adapters, from a folder; of one that is sharded, each rank reads its shards.

    Raises WeightsError for a tensor that is missing, left over, or of another shape, before anything is filled.
    """
    parameters = {
        unwrapped(name): p for name, p in model.named_parameters() if ".adapter." not in name
    }
    wanted = checked_layout(model, folder, parameters)
    for name in folder.files:
        reader = folder.reader(name)
        for key in folder.files[name]:
            for ours, piece in wanted.get(key, []):
                fill(parameters[ours], piece, reader)


def fill(parameter: Tensor, piece: Piece, reader: Reader) -> None:
    """Read a piece of a parameter, of one that is sharded the part that this rank holds."""
    local, first = own_part(parameter)
    part = piece.within(tuple((f, f + n) for f, n in zip(first, local.shape)))
    if part is not None:
        read = part.turned(reader.read(part.key, slices(part.theirs)))
        place = local[slices(tuple((a - f, b - f) for (a, b), f in zip(part.ours, first)))]
        place.copy_(read.reshape(place.shape))


def checked_layout(model: Any, folder: Folder, parameters: Mapping[str, Tensor]) -> Layout:
    """Say what each tensor of a folder is of a model. Raises WeightsError unless it holds just those of the model."""
    family = family_of(folder)
    if not isinstance(model, Transformer) or model.definition != family.model:
        other = getattr(model, "definition", type(model).__name__)
        raise WeightsError(f"{folder.path} holds a {family.model}, and the model is {other}")
    fused = bool(family.marks_fused) and any(
        key.endswith(family.marks_fused) for key in folder.keys
    )
    wanted = layout_of(family.model, family.entries(fused), model.config, parameters)
    _check(folder, wanted)
    return wanted


def _check(folder: Folder, wanted: Layout) -> None:
    left_over = {key for key in folder.keys - wanted.keys() if not key.endswith(_COMPUTED)}
    if "head.weight" not in {name for found in wanted.values() for name, _ in found}:
        left_over.discard("lm_head.weight")  # which some folders hold though it is the embedding
    if missing := sorted(wanted.keys() - folder.keys):
        raise WeightsError(f"{folder.path} lacks {missing[0]}{_and_others(missing)}")
    if left_over:
        extra = sorted(left_over)
        raise WeightsError(
            f"{folder.path} holds {extra[0]}{_and_others(extra)}, which the model has no use for"
        )
    for name, keys in folder.files.items():
        file = folder.reader(name).file
        for key in keys:
            if key in wanted:
                folder.check(key, wanted[key][0][1].shape, file, name)


def _and_others(names: list[str]) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""
