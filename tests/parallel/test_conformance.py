"""The exchanges and strategies of the package pass the kit."""

from tokenyard.testing import ExchangeConformance, StrategyConformance


class TestAllToAll(ExchangeConformance):
    backend = "all_to_all"
    options = {"validate": True}


class TestAllToAllInChunks(ExchangeConformance):
    backend = "all_to_all"
    options = {"chunks": 3}


class TestAllToAllTokens(ExchangeConformance):
    backend = "all_to_all_tokens"


class TestAllToAllTokensInChunks(ExchangeConformance):
    backend = "all_to_all_tokens"
    options = {"chunks": 2}


class TestFsdp(StrategyConformance):
    backend = "fsdp"


class TestFsdpThatKeepsParameters(StrategyConformance):
    backend = "fsdp"
    options = {"reshard_after_forward": False}


class TestDdp(StrategyConformance):
    backend = "ddp"
