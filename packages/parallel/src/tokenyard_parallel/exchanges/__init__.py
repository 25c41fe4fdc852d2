"""Carrying tokens to the ranks that hold their experts."""

from tokenyard_parallel.exchanges._slots import SlotExchange
from tokenyard_parallel.exchanges._tokens import TokenExchange
from tokenyard_parallel.exchanges._transfer import ExchangeError

__all__ = ["ExchangeError", "SlotExchange", "TokenExchange"]
