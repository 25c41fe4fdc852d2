"""Measure one expert-parallel layer over the ranks of a run, without its router."""

from tokenyard_bench.exchange.bench import ExchangeSettings, bench_exchange, check_ranks
from tokenyard_bench.exchange.world import World, join_ranks

__all__ = ["ExchangeSettings", "World", "bench_exchange", "check_ranks", "join_ranks"]
