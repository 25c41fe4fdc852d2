"""The plugin that the registry loads from the entry point."""

from __future__ import annotations

from tokenyard import Backend, hookimpl


@hookimpl
def tokenyard_strategies() -> list[Backend]:
    """Offer strategies over several ranks."""
    return [
        Backend("fsdp", "tokenyard_parallel.strategies:FsdpStrategy", priority=-1),
        Backend("ddp", "tokenyard_parallel.strategies:DdpStrategy", priority=-2),
    ]


@hookimpl
def tokenyard_exchanges() -> list[Backend]:
    """Offer exchanges for any ranks: after core's `local`, and those of one node."""
    return [
        Backend("all_to_all_tokens", "tokenyard_parallel.exchanges:TokenExchange", priority=-2),
        Backend("all_to_all", "tokenyard_parallel.exchanges:SlotExchange", priority=-3),
    ]
