"""Writing a model as LLM Foundry and MegaBlocks hold it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenyard import ConfigError, is_gated
from tokenyard_models.config import TransformerConfig
from tokenyard_models.hf._families import MEGABLOCKS, layout_of
from tokenyard_models.hf._folder import WeightsError
from tokenyard_models.hf._shards import SHARD_BYTES, dtypes, gathered, new_folder, write_weights
from tokenyard_models.init_weights import unwrapped

ARGUMENTS = "megablocks.json"


@torch.no_grad()
def to_megablocks(
    model: nn.Module,
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model under LLM Foundry's names, its experts as MegaBlocks' w1, v1 and w2 [E F, D].

    Beside the safetensors files stands ``megablocks.json`` with the fields of MegaBlocks' Arguments that describe the
    layers. The folder must not exist; it does when all is written. Raises WeightsError for a parameter that MegaBlocks
    has no name for (of dense layers, shared experts, biases of single experts), ConfigError if there are no experts.
    """
    path = Path(path)
    if path.exists():
        raise WeightsError(f"{path} exists already; give the name of a new folder")
    parameters = {unwrapped(name): p for name, p in model.named_parameters()}
    config: Any = model.config
    arguments = _arguments(config)
    layout = layout_of("MegaBlocks", MEGABLOCKS, config, parameters)
    with new_folder(path) as folder:
        write_weights(
            folder, layout, partial(gathered, parameters), dtypes(parameters, dtype), shard_bytes
        )
        (folder / ARGUMENTS).write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")


def _arguments(config: TransformerConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        raise ConfigError(
            "the model has no experts, and MegaBlocks' layers are experts; give one that has"
        )
    return {
        "hidden_size": config.dim,
        "ffn_hidden_size": moe.ffn_dim,
        "num_layers": config.layers,
        "bias": moe.output_bias,
        "mlp_type": "glu" if is_gated(moe.activation) else "mlp",
        "moe_num_experts": moe.num_experts,
        "moe_top_k": moe.top_k,
        "moe_capacity_factor": 0,
        "moe_normalize_expert_weights": moe.rule.normalize,
        "moe_jitter_eps": moe.rule.jitter or None,
        "moe_loss_weight": config.auxiliary.balance_weight,
        "moe_zloss_weight": config.auxiliary.z_weight,
    }
