"""What the plugin offers, without importing it."""

from __future__ import annotations

from tokenyard import Backend, hookimpl


@hookimpl
def tokenyard_models() -> list[Backend]:
    """Offer the model, for ``model.name``."""
    return [Backend("pruned_llama", "pruned_llama.model:PrunedLlama")]
