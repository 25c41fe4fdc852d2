"""The hooks of tokenyard. A plugin implements some with `hookimpl` and is named under the entry point `tokenyard`."""

from __future__ import annotations

import pluggy

from tokenyard.backend import Backend

hookspec = pluggy.HookspecMarker("tokenyard")
hookimpl = pluggy.HookimplMarker("tokenyard")
"""Marks a function of a plugin as the implementation of the hook of its name."""


@hookspec
def tokenyard_routers() -> list[Backend]:  # type: ignore[empty-body]
    """Offer implementations of Router: they decide which experts compute a token, and with what weight."""


@hookspec
def tokenyard_permutations() -> list[Backend]:  # type: ignore[empty-body]
    """Offer implementations of Permutation: they line slots up by expert and move rows there and back."""


@hookspec
def tokenyard_experts() -> list[Backend]:  # type: ignore[empty-body]
    """Offer implementations of ExpertKernel: they compute the experts."""


@hookspec
def tokenyard_exchanges() -> list[Backend]:  # type: ignore[empty-body]
    """Offer implementations of Exchange: they carry tokens to the ranks that hold their experts, and back."""


@hookspec
def tokenyard_strategies() -> list[Backend]:  # type: ignore[empty-body]
    """Offer implementations of Strategy: they lay a model out over devices."""


@hookspec
def tokenyard_models() -> list[Backend]:  # type: ignore[empty-body]
    """Offer implementations of Model: language models that `model.name` in a config may name."""
