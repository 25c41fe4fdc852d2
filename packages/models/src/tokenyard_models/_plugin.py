"""What the registry finds under the entry point."""

from __future__ import annotations

from tokenyard import Backend, hookimpl


@hookimpl
def tokenyard_models() -> list[Backend]:
    """Offer the definitions by the names that configs use."""
    return [
        Backend("dbrx", "tokenyard_models.families.dbrx:Dbrx"),
        Backend("llama", "tokenyard_models.families.llama:Llama"),
        Backend("mixtral", "tokenyard_models.families.mixtral:Mixtral"),
        Backend("olmoe", "tokenyard_models.families.olmoe:Olmoe"),
        Backend("qwen3", "tokenyard_models.families.qwen3:Qwen3"),
        Backend("qwen3_moe", "tokenyard_models.families.qwen3_moe:Qwen3Moe"),
        Backend("mpt_causal_lm", "tokenyard_models.families.mpt:Mpt"),
    ]
