"""Which tensor of a file is which of ours, family by family, and how each family writes its config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenyard_models.config import TransformerConfig
from tokenyard_models.dbrx import DbrxConfig
from tokenyard_models.hf import _published as published
from tokenyard_models.hf._pieces import (
    Operation,
    Piece,
    below,
    by_expert,
    heads,
    same,
    stacked,
    stacked_transposed,
)
from tokenyard_models.mixtral import MixtralConfig
from tokenyard_models.olmoe import OlmoeConfig
from tokenyard_models.qwen3_moe import Qwen3MoeConfig
from tokenyard_models.schema import Strict

Entry = tuple[str, tuple[str, ...], Operation]
"""(our name, the names in the file, how they are put together); {layer} and {expert} are counted."""


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's."""

    model: str  # our name of it
    schema: type[Strict]  # of its config.json
    table: tuple[Entry, ...]  # as published: a tensor for each expert
    publish: Callable[[TransformerConfig], dict[str, Any]]
    fused: tuple[Entry, ...] = ()  # entries in place of some: one tensor for all experts
    marks_fused: str = ""  # a name that only the fused form has
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what a config.json means that leaves them out
    renamed: Mapping[str, str] = field(default_factory=dict)  # keys of config.json that some versions call otherwise

    def pieces(
        self, config: TransformerConfig, shapes: Mapping[str, tuple[int, ...]], fused: bool
    ) -> Iterator[tuple[str, Piece]]:
        """Return (our name, piece) for every parameter among `shapes` that the table knows."""
        instead = {entry[0]: entry for entry in self.fused} if fused else {}
        return pieces_of([instead.get(entry[0], entry) for entry in self.table], config, shapes)


def pieces_of(
    table: Iterable[Entry], config: TransformerConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Piece]]:
    """Return (our name, piece) for every parameter among `shapes` that a table knows."""
    for ours, theirs, operation in table:
        for layer in range(config.layers) if "{layer}" in ours else [0]:
            name = ours.replace("{layer}", str(layer))
            if name in shapes:
                keys = [key.replace("{layer}", str(layer)) for key in theirs]
                for piece in operation(keys, shapes[name], config):
                    yield name, piece


def _at(layer: str, *names: str) -> tuple[str, ...]:
    return tuple(layer + name for name in names)


_BLOCK, _LAYER = "blocks.{layer}.", "model.layers.{layer}."
_LLAMA: tuple[Entry, ...] = (
    ("embed.weight", ("model.embed_tokens.weight",), same),
    (_BLOCK + "norm_1.weight", _at(_LAYER, "input_layernorm.weight"), same),
    (
        _BLOCK + "attention.qkv.weight",
        _at(_LAYER + "self_attn.", "q_proj.weight", "k_proj.weight", "v_proj.weight"),
        heads,
    ),
    (_BLOCK + "attention.q_norm.weight", _at(_LAYER, "self_attn.q_norm.weight"), same),
    (_BLOCK + "attention.k_norm.weight", _at(_LAYER, "self_attn.k_norm.weight"), same),
    (_BLOCK + "attention.out.weight", _at(_LAYER, "self_attn.o_proj.weight"), same),
    (_BLOCK + "norm_2.weight", _at(_LAYER, "post_attention_layernorm.weight"), same),
    ("norm.weight", ("model.norm.weight",), same),
    ("head.weight", ("lm_head.weight",), same),
)
_UP, _DOWN, _ROUTER = (_BLOCK + "ffn." + name for name in ("experts.up", "experts.down", "router.weight"))
_FUSED: tuple[Entry, ...] = (
    (_ROUTER, _at(_LAYER, "mlp.gate.weight"), same),
    (_UP, _at(_LAYER, "mlp.experts.gate_up_proj"), same),
    (_DOWN, _at(_LAYER, "mlp.experts.down_proj"), same),
)
_MARKS_FUSED = ".mlp.experts.gate_up_proj"

_MIXTRAL = (
    *_LLAMA,
    (_ROUTER, _at(_LAYER, "block_sparse_moe.gate.weight"), same),
    (_UP, _at(_LAYER + "block_sparse_moe.experts.{expert}.", "w1.weight", "w3.weight"), by_expert),
    (_DOWN, _at(_LAYER + "block_sparse_moe.experts.{expert}.", "w2.weight"), by_expert),
)
_QWEN = (
    *_LLAMA,
    (_ROUTER, _at(_LAYER, "mlp.gate.weight"), same),
    (_UP, _at(_LAYER + "mlp.experts.{expert}.", "gate_proj.weight", "up_proj.weight"), by_expert),
    (_DOWN, _at(_LAYER + "mlp.experts.{expert}.", "down_proj.weight"), by_expert),
    (_BLOCK + "ffn.up", _at(_LAYER + "mlp.", "gate_proj.weight", "up_proj.weight"), below),
    (_BLOCK + "ffn.down", _at(_LAYER, "mlp.down_proj.weight"), same),
)
_THEIRS = "transformer.blocks.{layer}."
_DBRX: tuple[Entry, ...] = (
    ("embed.weight", ("transformer.wte.weight",), same),
    (_BLOCK + "norm_1.weight", _at(_THEIRS, "norm_attn_norm.norm_1.weight"), same),
    (_BLOCK + "attention.qkv.weight", _at(_THEIRS, "norm_attn_norm.attn.Wqkv.weight"), same),
    (_BLOCK + "attention.out.weight", _at(_THEIRS, "norm_attn_norm.attn.out_proj.weight"), same),
    (_BLOCK + "norm_2.weight", _at(_THEIRS, "norm_attn_norm.norm_2.weight"), same),
    (_ROUTER, _at(_THEIRS, "ffn.router.layer.weight"), same),
    (_UP, _at(_THEIRS + "ffn.experts.mlp.", "w1", "v1"), stacked),
    (_DOWN, _at(_THEIRS + "ffn.experts.mlp.", "w2"), stacked_transposed),
    ("norm.weight", ("transformer.norm_f.weight",), same),
    ("head.weight", ("lm_head.weight",), same),
)

_OF_BLOCKS = (
    ("norm_1", "norm_1"),
    ("attention.qkv", "attn.Wqkv"),
    ("attention.q_norm", "attn.q_ln"),
    ("attention.k_norm", "attn.k_ln"),
    ("attention.out", "attn.out_proj"),
    ("norm_2", "norm_2"),
)
MEGABLOCKS: tuple[Entry, ...] = (
    ("embed.weight", ("transformer.wte.weight",), same),
    ("positions.weight", ("transformer.wpe.weight",), same),
    *((_BLOCK + ours + p, _at(_THEIRS, theirs + p), same) for ours, theirs in _OF_BLOCKS for p in (".weight", ".bias")),
    (_ROUTER, _at(_THEIRS, "ffn.router.layer.weight"), same),
    (_UP, _at(_THEIRS + "ffn.experts.mlp.", "w1", "v1"), stacked),
    (_DOWN, _at(_THEIRS + "ffn.experts.mlp.", "w2"), stacked_transposed),
    (_BLOCK + "ffn.bias", _at(_THEIRS, "ffn.experts.bias"), same),
    ("norm.weight", ("transformer.norm_f.weight",), same),
    ("norm.bias", ("transformer.norm_f.bias",), same),
    ("head.weight", ("lm_head.weight",), same),
)
"""The names that LLM Foundry gives to a model with MegaBlocks' experts."""

FAMILIES: Mapping[str, Family] = {
    "mixtral": Family("mixtral", MixtralConfig, _MIXTRAL, published.mixtral, _FUSED, _MARKS_FUSED),
    "qwen3_moe": Family(
        "qwen3_moe",
        Qwen3MoeConfig,
        _QWEN,
        published.qwen3_moe,
        _FUSED,
        _MARKS_FUSED,
        renamed={"num_local_experts": "num_experts"},  # since transformers 5.24
    ),
    "olmoe": Family("olmoe", OlmoeConfig, _QWEN, published.olmoe, _FUSED, _MARKS_FUSED),
    "dbrx": Family("dbrx", DbrxConfig, _DBRX, published.dbrx, defaults=published.DBRX_DEFAULTS),
}
"""By `model_type` of config.json."""
