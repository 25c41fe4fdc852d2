"""The base of all definitions: a transformer that is built from the keys of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel

from tokenyard_models.config import TransformerConfig
from tokenyard_models.config_errors import sections
from tokenyard_models.strict_config import Strict, merged, parse
from tokenyard_models.transformer import Transformer

_SYNONYMS = (
    ("num_experts", "num_local_experts", "moe_num_experts", "n_experts", "n_routed_experts"),
    ("num_experts_per_tok", "moe_top_k", "top_k", "topk", "n_activated_experts"),
    ("hidden_size", "d_model", "dim", "n_embd"),
    ("num_hidden_layers", "n_layers", "num_layers", "n_layer"),
    ("num_attention_heads", "n_heads", "num_heads", "n_head"),
    ("num_key_value_heads", "kv_n_heads", "num_kv_heads", "n_kv_heads", "num_query_groups"),
    ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size", "ffn_dim", "d_ff"),
    ("max_position_embeddings", "max_seq_len", "seq_length", "block_size", "context_length"),
    ("router_aux_loss_coef", "moe_loss_weight", "moe_aux_loss_coeff", "aux_loss_coef"),
)
"""Names for one thing, in the families here and in other programs."""


class ModelConfig(Strict):
    """The keys of a `model:` section."""

    @classmethod
    def habits(cls, where: str) -> Mapping[str, str]:
        """Return this family's key by the names that other families and programs have for it."""
        paths = _paths(cls, where)
        return {
            name: paths[key]
            for names in _SYNONYMS
            for key in [next((name for name in names if name in paths), None)]
            if key is not None
            for name in names
        }

    def resolve(self) -> TransformerConfig:
        """Return the config of the transformer. Raises ConfigError for contradicting keys."""
        raise NotImplementedError


def _paths(section: type[BaseModel], where: str) -> dict[str, str]:
    """Return the path of each key of a section and of those below it, the outermost first."""
    paths = {key: f"{where}.{key}" for key in section.model_fields}
    for key, field in section.model_fields.items():
        for member in sections(field.annotation):
            paths = _paths(member, paths[key]) | paths
    return paths


class Definition(Transformer):
    """A transformer that a `model:` section describes.

    `config` holds the keys of the section; the other arguments are Transformer's.
    """

    schema: ClassVar[type[ModelConfig]]
    tiny: ClassVar[Mapping[str, Any]]  # the keys of `size: tiny`
    readme: ClassVar[tuple[str, str]]  # columns of the README's table: keys, sizes

    def __init__(self, config: Mapping[str, Any], **placement: Any):
        super().__init__(self.resolve(config), **placement)

    @classmethod
    def resolve(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """Read the keys of a `model:` section without building anything. Raises ConfigError."""
        return cls.read(config).resolve()

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Return the keys of a `model:` section with their defaults. Raises ConfigError."""
        keys = merged(cls.tiny, config) if config.get("size") == "tiny" else config
        return parse(cls.schema, keys, "model")
