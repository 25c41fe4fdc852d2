"""The hooks of tokenyard.

A plugin is a module that implements some of these hooks, each marked with `hookimpl`. Its
distribution names the module under the entry point `tokenyard`.
"""

from __future__ import annotations

import pluggy

from tokenyard.backend import Backend

hookspec = pluggy.HookspecMarker("tokenyard")
hookimpl = pluggy.HookimplMarker("tokenyard")
"""Decorator that marks a plugin's function as the implementation of the hook of the same name."""


@hookspec
def tokenyard_routers() -> list[Backend]:  # type: ignore[empty-body]
    """Offer routers, which choose the experts of each token and their weights (`Router`)."""


@hookspec
def tokenyard_permutations() -> list[Backend]:  # type: ignore[empty-body]
    """Offer permutations, which sort slots by expert and move rows (`Permutation`)."""


@hookspec
def tokenyard_experts() -> list[Backend]:  # type: ignore[empty-body]
    """Offer expert kernels, which compute the experts (`ExpertKernel`)."""


@hookspec
def tokenyard_exchanges() -> list[Backend]:  # type: ignore[empty-body]
    """Offer exchanges, which send tokens to the ranks of their experts and back (`Exchange`)."""


@hookspec
def tokenyard_strategies() -> list[Backend]:  # type: ignore[empty-body]
    """Offer strategies, which shard or replicate a model over devices (`Strategy`)."""


@hookspec
def tokenyard_models() -> list[Backend]:  # type: ignore[empty-body]
    """Offer language models, which a config selects by `model.name` (`Model`)."""
