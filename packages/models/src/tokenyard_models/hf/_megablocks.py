"""Write a model in the format of LLM Foundry and MegaBlocks, and read weights in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tokenyard import AuxiliaryLoss, ConfigError, is_gated
from tokenyard_models.config import MoEConfig, TransformerConfig
from tokenyard_models.families._boxes import concat, copy, stacked, stacked_transposed, swapped
from tokenyard_models.families._format import Row
from tokenyard_models.families._names import BLOCK, DOWN, ROUTER, UP, names
from tokenyard_models.ffn_config import FfnConfig
from tokenyard_models.hf._folder import Folder, WeightsError
from tokenyard_models.hf._folder_map import map_folder
from tokenyard_models.hf._load import check_tensors, fill_from
from tokenyard_models.hf._save import check_read_back, computed_fields
from tokenyard_models.hf._shards import (
    SHARD_BYTES,
    Report,
    dtypes,
    gather,
    new_folder,
    silent,
    whole_state,
    write_weights,
)
from tokenyard_models.strict_config import parse

log = logging.getLogger("tokenyard")

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

_WITH_CAPACITY = {
    UP: Row(UP, (_FOUNDRY_BLOCK + "ffn.experts.mlp.w1",), swapped),
    DOWN: Row(DOWN, (_FOUNDRY_BLOCK + "ffn.experts.mlp.w2",), swapped),
}
"""The rows of layers with a capacity (mb_moe), by parameter."""

_ACTIVATIONS = {
    "swiglu": ("silu", "none"),
    "geglu": ("gelu", "none"),
    "reglu": ("relu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}
"""Function and approximation, by core's name of an activation; others are named as in core."""


@torch.no_grad()
def to_megablocks(
    model: nn.Module,
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: Report = silent,
) -> None:
    """Write a model under LLM Foundry's names, with experts as MegaBlocks' w1, v1 and w2 [E F, D].

    The folder also holds ``megablocks.json`` with the fields of MegaBlocks' Arguments that describe
    the layers; `activation_fn` is an LLM Foundry `ffn_act_fn`, because JSON holds no functions.
    Layers with a capacity have MegaBlocks' w1 [E, D, F] and w2 [E, F, D]. `path` must not exist; it
    appears once everything is written and read back. `report` is that of `to_hf`. Raises
    WeightsError for a rule that these fields cannot express and for a parameter or buffer that
    MegaBlocks has no name for, and ConfigError for a dense model.
    """
    path = Path(path)
    if path.exists():
        raise WeightsError(f"{path} exists already; give the name of a new folder")
    config: Any = model.config
    arguments = _arguments(config)
    state = whole_state(model)
    folder_map = map_folder("MegaBlocks", _rows(config), config, state)
    with new_folder(path) as folder:
        write_weights(
            folder, folder_map, partial(gather, state), dtypes(state, dtype), shard_bytes, report
        )
        (folder / ARGUMENTS).write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
        check_tensors(Folder(folder, ARGUMENTS), folder_map)


@torch.no_grad()
def load_foundry(model: nn.Module, path: Path | str) -> None:
    """Fill a model's parameters from safetensors files with LLM Foundry's names.

    Dense layers and MegaBlocks' experts are read, for a model of the same sizes. Of a sharded
    model, each rank reads its shards. Raises WeightsError for a tensor that is missing, left over,
    or of another shape, before it changes any parameter.
    """
    folder = Folder(path, None)
    config: Any = model.config
    rows = (*_rows(config), *_dense_rows(config))
    fill_from(model, folder, partial(map_folder, "LLM Foundry", rows, config))


def _dense_rows(config: TransformerConfig) -> tuple[Row, ...]:
    """Return the weight table of dense layers."""
    ups = ("gate_proj", "up_proj") if is_gated(config.dense_activation) else ("up_proj",)
    modules = {"up": ups, "down": ("down_proj",)}
    return tuple(
        Row(
            BLOCK + f"ffn.{name}{ours}",
            tuple(f"{_FOUNDRY_BLOCK}ffn.{part}.{kind}" for part in parts),
            concat,
        )
        for name, parts in modules.items()
        for ours, kind in (("", "weight"), ("_bias", "bias"))
    )


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    """Return the weight table of dropless layers, or of those with a capacity."""
    if config.moe is None or config.moe.rule.capacity_factor is None:
        return WEIGHTS
    return tuple(_WITH_CAPACITY.get(row.parameter, row) for row in WEIGHTS)


def _arguments(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields of MegaBlocks' Arguments.

    Raises ConfigError for a dense model, and WeightsError if the fields cannot express its layers.
    """
    moe = config.moe
    if moe is None:
        raise ConfigError(
            "the model has no experts, and MegaBlocks' layers are experts; give one that has"
        )
    name, approximate = _ACTIVATIONS.get(moe.activation, (moe.activation, "none"))
    arguments = {
        "hidden_size": config.dim,
        "ffn_hidden_size": moe.ffn_dim,
        "num_layers": config.layers,
        "bias": moe.output_bias,
        "activation_fn": {"name": name, "approximate": approximate},
        "mlp_type": "glu" if is_gated(moe.activation) else "mlp",
        "moe_num_experts": moe.num_experts,
        "moe_top_k": moe.top_k,
        "moe_capacity_factor": moe.rule.capacity_factor or 0,
        "moe_normalize_expert_weights": moe.rule.normalize,
        "moe_jitter_eps": moe.rule.jitter or None,
        "moe_loss_weight": _loss_weight(config.auxiliary),
        "moe_zloss_weight": config.auxiliary.z_weight,
    }
    fields = computed_fields({"moe": asdict(moe)})
    check_read_back(
        "MegaBlocks", fields, computed_fields({"moe": asdict(_read_arguments(arguments))})
    )
    if moe.rule.capacity_factor is not None and is_gated(moe.activation):
        raise WeightsError(
            f"a MegaBlocks folder cannot say that moe.activation is {moe.activation!r} where "
            "experts have a capacity: MegaBlocks' mb_moe has no gated experts"
        )
    return arguments


def _read_arguments(arguments: Mapping[str, Any]) -> MoEConfig:
    """Return the MoE layers that MegaBlocks makes of its Arguments."""
    keys = {
        key: arguments[key]
        for key in (
            "mlp_type",
            "moe_num_experts",
            "moe_top_k",
            "moe_capacity_factor",
            "moe_normalize_expert_weights",
            "moe_jitter_eps",
        )
    }
    keys["ffn_type"] = "mb_moe" if arguments["moe_capacity_factor"] else "mb_dmoe"
    keys["ffn_act_fn"] = arguments["activation_fn"]
    moe = parse(FfnConfig, keys, "megablocks").moe(arguments["ffn_hidden_size"], arguments["bias"])
    return cast(MoEConfig, moe)


def _loss_weight(auxiliary: AuxiliaryLoss) -> float | None:
    """Return the weight of the load-balancing loss; None, with a warning, for transformers' loss.

    No weight of MegaBlocks' loss gives transformers' one.
    """
    if auxiliary.convention == "megablocks" or not auxiliary.balance_weight:
        return auxiliary.balance_weight
    log.warning(
        "moe_loss_weight is written as null: the model's weight %s is of transformers' loss, "
        "and MegaBlocks' loss is another; set it to train on",
        auxiliary.balance_weight,
    )
    return None
