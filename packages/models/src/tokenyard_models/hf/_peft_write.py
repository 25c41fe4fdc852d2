"""Write LoRA adapters as PEFT does. PEFT is not needed; a test compares with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenyard import LoraAdapter
from tokenyard.lora import adapters
from tokenyard.sharded import is_sharded
from tokenyard_models.hf._folder import WeightsError
from tokenyard_models.hf._peft_places import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_DIGEST,
    INNER,
    PREFIX,
    Place,
    places_of,
)
from tokenyard_models.hf._shards import new_folder, save_tensors


@torch.no_grad()
def to_peft(
    model: nn.Module,
    path: Path | str,
    *,
    base: str | None = None,
    base_digest: str | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Write a model's adapters as a new folder that PEFT loads; return their number of parameters.

    `base` is the folder or the name of the model that they are for, and `base_digest` any text that
    names its numbers, for `PeftFolder`. `dtype` is that of the matrices (default: their own).
    Raises WeightsError for a model without adapters, for one that PEFT has no form of, and for one
    whose other parameters were trained too.
    """
    found = [(name, adapter) for name, _, adapter in adapters(model)]
    if not found:
        raise WeightsError("the model has no LoRA adapters; write it by --to hf")
    trained = [n for n, p in model.named_parameters() if p.requires_grad and ".adapter." not in n]
    if trained:
        raise WeightsError(
            f"PEFT's folder holds adapters alone, and {trained[0]} was trained too; write the "
            "merged model by --to hf"
        )
    places = places_of(model)
    tensors: dict[str, Tensor] = {}
    for name, adapter in found:
        for target in adapter.targets:
            inner = INNER if _is_inner(target, adapter.targets) else ""
            for place, a, b in _matrices(places, name, target, adapter):
                for letter, matrix in (("A", a), ("B", b)):
                    key = f"{PREFIX}{place.module}.{inner if place.parameter else ''}lora_{letter}"
                    tensors[f"{key}.weight"] = matrix.to("cpu", dtype or matrix.dtype).contiguous()
    config = _config(places, found, base)
    with new_folder(Path(path)) as folder:
        digest = {} if base_digest is None else {BASE_DIGEST: base_digest}
        save_tensors(tensors, folder / ADAPTER_WEIGHTS, digest)
        text = json.dumps(config, indent=2) + "\n"
        (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    return sum(tensor.numel() for tensor in tensors.values())


def _matrices(
    places: Mapping[str, list[Place]], name: str, target: str, adapter: LoraAdapter
) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """Yield the place, A and B of each part of a weight, in PEFT's shapes."""
    weight = f"{name}.{target}".lstrip(".")
    if weight not in places:
        raise WeightsError(
            f"PEFT has no adapter of {weight} in this architecture; write the merged model by "
            "--to hf"
        )
    a, b = (_whole(matrix) for matrix in adapter.matrices(target))
    rows = adapter.parts.get(target, (b.shape[-2],))
    for place, a_part, b_part in zip(
        places[weight], a.split(adapter.settings.rank, -2), b.split(rows, -2)
    ):
        if a.dim() == 2:
            yield place, a_part, b_part
        else:
            yield place, a_part.flatten(0, 1), b_part.permute(1, 2, 0).flatten(1)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor.detach()


def _is_inner(target: str, targets: list[str]) -> bool:
    return target == "up" and "down" in targets


def _config(
    places: Mapping[str, list[Place]], found: list[tuple[str, LoraAdapter]], base: str | None
) -> dict[str, Any]:
    """Return adapter_config.json."""
    settings = found[0][1].settings
    chosen = {f"{name}.{t}".lstrip(".") for name, adapter in found for t in adapter.targets}
    modules, parameters = (_targets(places, chosen, kind) for kind in (False, True))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        # PEFT has none for parameters
        "lora_dropout": 0.0 if parameters else settings.dropout,
        "use_rslora": settings.rank_stabilized,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _targets(places: Mapping[str, list[Place]], chosen: set[str], parameters: bool) -> list[str]:
    """Return PEFT's names of the chosen weights: without the layer where all layers have them."""
    layers: dict[str, set[str]] = {}  # name without the layer -> names with it
    missing: set[str] = set()
    for name, parts in places.items():
        for place in parts:
            if (place.parameter is not None) != parameters:
                continue
            full = ".".join(filter(None, place))
            short = re.sub(r"^model\.layers\.\d+\.", "", full)
            layers.setdefault(short, set())
            if name in chosen:
                layers[short].add(full)
            else:
                missing.add(short)
    names: list[str] = []
    for short, full_names in layers.items():
        names += sorted(full_names) if short in missing else [short]
    return names
