"""The exchange of core."""

from tokenyard.exchanges._local import LocalExchange

__all__ = ["LocalExchange"]
