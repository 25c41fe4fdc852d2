"""Which tensor of a file is which of ours, family by family, and how each family writes its config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokenyard_models.config import TransformerConfig
from tokenyard_models.families._boxes import (
    Operation,
    Piece,
    below,
    by_expert,
    heads,
    same,
    stacked,
    stacked_transposed,
)
from tokenyard_models.families.dbrx import Dbrx
from tokenyard_models.families.llama import Llama
from tokenyard_models.families.mixtral import Mixtral
from tokenyard_models.families.olmoe import Olmoe
from tokenyard_models.families.qwen3 import Qwen3
from tokenyard_models.families.qwen3_moe import Qwen3Moe
from tokenyard_models.hf import _config_json as published
from tokenyard_models.hf._defaults import DEFAULTS
from tokenyard_models.hf._folder import WeightsError
from tokenyard_models.schema import without_ignored

Entry = tuple[str, tuple[str, ...], Operation]
"""(our name, the names in the file, how they are put together); {layer} and {expert} are counted."""


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's."""

    definition: type[Any]  # ours, of its models
    table: tuple[Entry, ...]  # as published: a tensor for each expert
    publish: Callable[[TransformerConfig], dict[str, Any]]
    fused: tuple[Entry, ...] = ()  # entries in place of some: one tensor for all experts
    marks_fused: str = ""  # a name that only the fused form has
    renamed: Mapping[str, str] = field(
        default_factory=dict
    )  # keys of config.json that some versions call otherwise
    upcycled: str = ""  # of a dense family, the one that it is with experts

    @property
    def model(self) -> str:
        """Our name of it."""
        name: str = self.definition.definition
        return name

    def entries(self, fused: bool) -> list[Entry]:
        """Return the table, of a folder in either form."""
        instead = {entry[0]: entry for entry in self.fused} if fused else {}
        return [instead.get(entry[0], entry) for entry in self.table]

    def section(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json as a config's `model:` section."""
        keys = {self.renamed.get(key, key): value for key, value in config.items()}
        filled = _filled(DEFAULTS[config["model_type"]], keys)
        return without_ignored(self.definition.schema, filled, "model", [])


Layout = dict[str, list[tuple[str, Piece]]]
"""For each tensor of a folder, in order, what it is made of: (our name, piece)."""


def layout_of(
    form: str, table: Iterable[Entry], config: TransformerConfig, parameters: Mapping[str, Tensor]
) -> Layout:
    """Say what each tensor of a folder is made of. Raises WeightsError for a parameter that has no place in it."""
    layout: Layout = {}
    covered: set[str] = set()
    for ours, theirs, operation in table:
        for layer in range(config.layers) if "{layer}" in ours else [0]:
            name = ours.replace("{layer}", str(layer))
            if name in parameters:
                keys = [key.replace("{layer}", str(layer)) for key in theirs]
                for piece in operation(keys, tuple(parameters[name].shape), config):
                    layout.setdefault(piece.key, []).append((name, piece))
                covered.add(name)
    if uncovered := sorted(parameters.keys() - covered):
        raise WeightsError(f"the model's {uncovered[0]} has no place in a {form} folder")
    return layout


def _filled(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was given, and defaults for what was not, section by section."""
    result = dict(given)
    for key, value in defaults.items():
        below = given.get(key, {} if isinstance(value, Mapping) else value)
        result[key] = (
            _filled(value, below)
            if isinstance(value, Mapping) and isinstance(below, Mapping)
            else below
        )
    return result


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
_UP, _DOWN, _ROUTER = (
    _BLOCK + "ffn." + name for name in ("experts.up", "experts.down", "router.weight")
)
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
_DENSE: tuple[Entry, ...] = (
    *_LLAMA,
    (_BLOCK + "ffn.up", _at(_LAYER + "mlp.", "gate_proj.weight", "up_proj.weight"), below),
    (_BLOCK + "ffn.down", _at(_LAYER, "mlp.down_proj.weight"), same),
)
_QWEN = (
    *_DENSE,
    (_ROUTER, _at(_LAYER, "mlp.gate.weight"), same),
    (_UP, _at(_LAYER + "mlp.experts.{expert}.", "gate_proj.weight", "up_proj.weight"), by_expert),
    (_DOWN, _at(_LAYER + "mlp.experts.{expert}.", "down_proj.weight"), by_expert),
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
    *(
        (_BLOCK + ours + p, _at(_THEIRS, theirs + p), same)
        for ours, theirs in _OF_BLOCKS
        for p in (".weight", ".bias")
    ),
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
    "mixtral": Family(Mixtral, _MIXTRAL, published.mixtral, _FUSED, _MARKS_FUSED),
    "qwen3_moe": Family(
        Qwen3Moe,
        _QWEN,
        published.qwen3_moe,
        _FUSED,
        _MARKS_FUSED,
        renamed={"num_local_experts": "num_experts"},  # since transformers 5.24
    ),
    "olmoe": Family(Olmoe, _QWEN, published.olmoe, _FUSED, _MARKS_FUSED),
    "dbrx": Family(Dbrx, _DBRX, published.dbrx),
    "llama": Family(Llama, _DENSE, published.llama, upcycled="mixtral"),
    "mistral": Family(Llama, _DENSE, published.llama, upcycled="mixtral"),
    "qwen3": Family(Qwen3, _DENSE, published.qwen3, upcycled="qwen3_moe"),
}
"""By `model_type` of config.json."""
