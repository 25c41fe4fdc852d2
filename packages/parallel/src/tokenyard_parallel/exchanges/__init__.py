"""Exchanges: they carry tokens to the ranks that hold their experts, and results back."""

from tokenyard_parallel.exchanges._slots import SlotExchange
from tokenyard_parallel.exchanges._tokens import TokenExchange
from tokenyard_parallel.exchanges._transfer import ExchangeError

__all__ = ["ExchangeError", "SlotExchange", "TokenExchange"]
