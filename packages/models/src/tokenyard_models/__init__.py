"""One transformer, the published model families built on it, and Hugging Face folders."""

from tokenyard_models.__about__ import __version__
from tokenyard_models.block import Block
from tokenyard_models.config import MoEConfig, TransformerConfig
from tokenyard_models.families.dbrx import Dbrx
from tokenyard_models.families.llama import Llama
from tokenyard_models.families.mixtral import Mixtral
from tokenyard_models.families.mpt import Mpt
from tokenyard_models.families.olmoe import Olmoe
from tokenyard_models.families.qwen3 import Qwen3
from tokenyard_models.families.qwen3_moe import Qwen3Moe
from tokenyard_models.hf import WeightsError, from_hf, to_hf, upcycle
from tokenyard_models.hf.transformers_plugin import use_in_transformers
from tokenyard_models.init_weights import initialize
from tokenyard_models.kv_cache import Cache
from tokenyard_models.rope_scaling import RopeScaling
from tokenyard_models.strict_config import Strict, parse
from tokenyard_models.transformer import Transformer
from tokenyard_models.upcycling import Upcycling

__all__ = [
    "Block",
    "Cache",
    "Dbrx",
    "Llama",
    "Mixtral",
    "MoEConfig",
    "Mpt",
    "Olmoe",
    "Qwen3",
    "Qwen3Moe",
    "RopeScaling",
    "Strict",
    "Transformer",
    "TransformerConfig",
    "Upcycling",
    "WeightsError",
    "__version__",
    "from_hf",
    "initialize",
    "parse",
    "to_hf",
    "upcycle",
    "use_in_transformers",
]
