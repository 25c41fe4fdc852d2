"""Llama (Touvron et al. 2023, arXiv 2307.09288), a dense model, and Mistral 7B (arXiv 2310.06825).

The keys are those of the published config.json files.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenyard_models.config import TransformerConfig
from tokenyard_models.families._config_json import llama_keys
from tokenyard_models.families._definition import Definition
from tokenyard_models.families._format import HfFormat
from tokenyard_models.families._hf_keys import LlamaKeys, check_window
from tokenyard_models.families._names import DENSE
from tokenyard_models.strict_config import only


class LlamaConfig(LlamaKeys):
    """Llama's keys. Defaults: Llama 2 7B (`size: full`, 6.7 B parameters) or `size: tiny`."""

    ignored: ClassVar[frozenset[str]] = (LlamaKeys.ignored - {"model_type"}) | {
        "is_llama_config",
        "max_sequence_length",
        "pretraining_tp",
    }

    model_type: Literal["llama", "mistral"] | None = None  # of Hugging Face folders to write

    vocab_size: int = Field(32000, ge=1)
    hidden_size: int = Field(4096, ge=1)
    intermediate_size: int = Field(11008, ge=1)
    num_hidden_layers: int = Field(32, ge=1)
    num_attention_heads: int = Field(32, ge=1)
    head_dim: int | None = Field(None, ge=1)  # default: hidden_size / num_attention_heads
    attention_bias: Annotated[bool, only(False, "a bias in attention")] = False
    mlp_bias: Annotated[bool, only(False, "a bias in the feed-forward layers")] = False
    sliding_window: int | None = Field(None, ge=1)  # at least the longest sequence: no effect

    def resolve(self) -> TransformerConfig:
        """Return the config of the transformer. Raises ConfigError."""
        check_window(self.sliding_window, self.length)
        return self.transformer(
            self.head_dim,
            moe=None,
            dense_ffn_dim=self.intermediate_size,
            model_type=self.model_type,
        )


class Llama(Definition):
    """Llama: dense. `upcycle` makes a Mixtral of it."""

    definition = "llama"
    schema = LlamaConfig
    readme = (
        "the config.json of Llama, and of Mistral's dense models",
        "`size: full` (Llama 2's 7B) or `tiny`; no experts",
    )
    tiny: ClassVar[dict[str, Any]] = {
        "vocab_size": 257,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }


def llama_json(config: TransformerConfig) -> dict[str, Any]:
    """Return Llama's config.json."""
    return llama_keys(config, "LlamaForCausalLM", "llama") | {
        "intermediate_size": config.dense_width,
        "head_dim": config.head_dim,
        "attention_bias": False,
        "mlp_bias": False,
    }


def mistral_json(config: TransformerConfig) -> dict[str, Any]:
    """Return Mistral's config.json."""
    return llama_keys(config, "MistralForCausalLM", "mistral") | {
        "intermediate_size": config.dense_width,
        "head_dim": config.head_dim,
        "sliding_window": None,
    }


def llama_refuses(config: TransformerConfig) -> str | None:
    """Return why transformers' Llama refuses a config, or None. Its Mistral takes any width."""
    if config.dim % config.heads:
        return f"hidden_size {config.dim} is no multiple of num_attention_heads {config.heads}"
    return None


FORMATS = (
    HfFormat(
        Llama,
        "llama",
        DENSE,
        llama_json,
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
        refuses=llama_refuses,
        upcycled="mixtral",
    ),
    HfFormat(
        Llama,
        "mistral",
        DENSE,
        mistral_json,
        defaults={
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "sliding_window": 4096,
        },
        upcycled="mixtral",
    ),
)
