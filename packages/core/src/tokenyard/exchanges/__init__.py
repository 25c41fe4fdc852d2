"""Core's exchanges."""

from tokenyard.exchanges._local import LocalExchange

__all__ = ["LocalExchange"]
