"""Where PEFT has the adapter of each weight, in adapter_config.json and adapter_model.safetensors.

Linear layers are `target_modules`. The experts of a layer, which transformers 5 holds as one tensor
of three dimensions, are `target_parameters`: A is [E * rank, columns] and B is [rows, rank * E].
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenyard.lora import lora_weights
from tokenyard_models.families._boxes import copy
from tokenyard_models.hf._save import format_to_write

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_DIGEST = "base_digest"
"""Key of our metadata in adapter_model.safetensors, which PEFT does not read."""

PREFIX = "base_model.model."
INNER = "base_layer."
"""PEFT wraps the first of two parameters of a module inside the second."""


class Place(NamedTuple):
    """Where PEFT has the adapter of a weight, or of one part of a fused weight."""

    module: str  # with LoRA's matrices, such as model.layers.0.self_attn.q_proj
    parameter: str | None  # of a module's target_parameters, such as gate_up_proj


def places_of(model: Any) -> dict[str, list[Place]]:
    """Return where PEFT has the adapter of each weight; of a fused one, of each part.

    A weight that PEFT has no form of is left out.
    """
    hf_format = format_to_write(model)
    places: dict[str, list[Place]] = {}
    weights = lora_weights(model)
    for row in hf_format.rows(fused=True):
        for layer in range(model.config.layers) if "{layer}" in row.parameter else [0]:
            name = row.parameter.replace("{layer}", str(layer))
            if name not in weights:
                continue
            keys = [key.replace("{layer}", str(layer)) for key in row.keys]
            weight = weights[name]
            stacked = weight.tensor.dim() == 3 and row.operation is not copy
            if len(weight.parts or (0,)) == len(keys) and not stacked:
                places[name] = [_place(key) for key in keys]
    return places


def _place(key: str) -> Place:
    module, _, leaf = key.rpartition(".")
    return Place(module, None if leaf == "weight" else leaf)
