"""What the registry finds under the entry point."""

from __future__ import annotations

from tokenyard import Backend, hookimpl


@hookimpl
def tokenyard_strategies() -> list[Backend]:
    """Offer layouts over the processes of a run."""
    return [
        Backend("fsdp", "tokenyard_parallel.strategies:FsdpStrategy", priority=-1),
        Backend("ddp", "tokenyard_parallel.strategies:DdpStrategy", priority=-2),
    ]


@hookimpl
def tokenyard_exchanges() -> list[Backend]:
    """Offer exchanges for expert parallelism; core's `local` is first where there is none."""
    return [
        Backend("all_to_all_tokens", "tokenyard_parallel.exchanges:TokenExchange", priority=-1),
        Backend("all_to_all", "tokenyard_parallel.exchanges:SlotExchange", priority=-2),
    ]
