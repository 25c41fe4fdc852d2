"""Write a model in the format of LLM Foundry and MegaBlocks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenyard import ConfigError, is_gated
from tokenyard_models.config import TransformerConfig
from tokenyard_models.families._boxes import copy, stacked, stacked_transposed
from tokenyard_models.families._format import Row
from tokenyard_models.families._names import BLOCK, DOWN, ROUTER, UP, names
from tokenyard_models.hf._folder import WeightsError
from tokenyard_models.hf._folder_map import map_folder
from tokenyard_models.hf._shards import (
    SHARD_BYTES,
    dtypes,
    gather,
    new_folder,
    whole_state,
    write_weights,
)

ARGUMENTS = "megablocks.json"

_FOUNDRY_BLOCK = "transformer.blocks.{layer}."
_FOUNDRY_NAMES = {
    "norm_1": "norm_1",
    "attention.qkv": "attn.Wqkv",
    "attention.q_norm": "attn.q_ln",
    "attention.k_norm": "attn.k_ln",
    "attention.out": "attn.out_proj",
    "norm_2": "norm_2",
}
WEIGHTS = (
    Row("embed.weight", ("transformer.wte.weight",), copy),
    Row("positions.weight", ("transformer.wpe.weight",), copy),
    *(
        Row(f"{BLOCK}{module}.{kind}", (f"{_FOUNDRY_BLOCK}{foundry_module}.{kind}",), copy)
        for module, foundry_module in _FOUNDRY_NAMES.items()
        for kind in ("weight", "bias")
    ),
    Row(ROUTER, (_FOUNDRY_BLOCK + "ffn.router.layer.weight",), copy),
    Row(UP, names(_FOUNDRY_BLOCK + "ffn.experts.mlp.", "w1", "v1"), stacked),
    Row(DOWN, (_FOUNDRY_BLOCK + "ffn.experts.mlp.w2",), stacked_transposed),
    Row(BLOCK + "ffn.bias", (_FOUNDRY_BLOCK + "ffn.experts.bias",), copy),
    Row("norm.weight", ("transformer.norm_f.weight",), copy),
    Row("norm.bias", ("transformer.norm_f.bias",), copy),
    Row("head.weight", ("lm_head.weight",), copy),
)
"""The names that LLM Foundry gives to a model with MegaBlocks' experts."""


@torch.no_grad()
def to_megablocks(
    model: nn.Module,
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model under LLM Foundry's names, with experts as MegaBlocks' w1, v1 and w2 [E F, D].

    The folder also holds ``megablocks.json`` with the fields of MegaBlocks' Arguments that describe
    the layers. `path` must not exist; it appears once everything is written. Raises WeightsError
    for a parameter that MegaBlocks has no name for (of dense layers, shared experts, biases of
    single experts), and ConfigError for a dense model.
    """
    path = Path(path)
    if path.exists():
        raise WeightsError(f"{path} exists already; give the name of a new folder")
    state = whole_state(model)
    config: Any = model.config
    arguments = _arguments(config)
    folder_map = map_folder("MegaBlocks", WEIGHTS, config, state)
    with new_folder(path) as folder:
        write_weights(folder, folder_map, partial(gather, state), dtypes(state, dtype), shard_bytes)
        (folder / ARGUMENTS).write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")


def _arguments(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields of MegaBlocks' Arguments. Raises ConfigError for a dense model."""
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
