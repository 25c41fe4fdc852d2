"""Qwen3's dense models (Qwen team 2025, arXiv 2505.09388): RMSNorm of each query and key head.

The keys are those of the published config.json.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenyard_models.config import TransformerConfig
from tokenyard_models.families._config_json import llama_keys
from tokenyard_models.families._definition import Definition
from tokenyard_models.families._format import HfFormat
from tokenyard_models.families._hf_keys import LlamaKeys
from tokenyard_models.families._names import DENSE
from tokenyard_models.strict_config import only


class Qwen3Config(LlamaKeys):
    """Qwen3's keys. Defaults: 8B (`size: full`, 8.2 B parameters) or `size: tiny`."""

    ignored: ClassVar[frozenset[str]] = LlamaKeys.ignored | {"max_window_layers"}

    vocab_size: int = Field(151936, ge=1)
    hidden_size: int = Field(4096, ge=1)
    intermediate_size: int = Field(12288, ge=1)
    num_hidden_layers: int = Field(36, ge=1)
    num_attention_heads: int = Field(32, ge=1)
    num_key_value_heads: int = Field(8, ge=1)
    head_dim: int = Field(128, ge=1)  # width of a head
    max_position_embeddings: int = Field(40960, ge=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    rope_theta: float = Field(1e6, gt=0)
    attention_bias: Annotated[bool, only(False, "a bias in attention")] = False
    use_sliding_window: Annotated[bool, only(False, "sliding-window attention")] = False
    sliding_window: int | None = None  # unused without use_sliding_window
    layer_types: list[Literal["full_attention"]] | None = None  # attention of each layer

    def resolve(self) -> TransformerConfig:
        """Return the config of the transformer. Raises ConfigError."""
        return self.transformer(
            self.head_dim, moe=None, dense_ffn_dim=self.intermediate_size, qk_norm="head"
        )


class Qwen3(Definition):
    """Qwen3: dense. `upcycle` makes a Qwen3-MoE of it."""

    definition = "qwen3"
    schema = Qwen3Config
    readme = (
        "the config.json of Qwen3's dense models",
        "`size: full` (8B) or `tiny`; no experts",
    )
    tiny: ClassVar[dict[str, Any]] = {
        "vocab_size": 257,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
    }


def config_json(config: TransformerConfig) -> dict[str, Any]:
    """Return Qwen3's config.json."""
    return llama_keys(config, "Qwen3ForCausalLM", "qwen3") | {
        "intermediate_size": config.dense_width,
        "head_dim": config.head_dim,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }


FORMATS = (
    HfFormat(
        Qwen3,
        "qwen3",
        DENSE,
        config_json,
        defaults={
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "rope_theta": 10000.0,
        },
        upcycled="qwen3_moe",
    ),
)
