"""Core's own backends pass the kit that it asks of others."""

from tokenyard.testing import (
    ExchangeConformance,
    ExpertsConformance,
    PermutationConformance,
    RouterConformance,
    StrategyConformance,
)


class TestTorchExperts(ExpertsConformance):
    backend = "torch"


class TestCpuExperts(ExpertsConformance):
    backend = "cpu"
    device = "cpu"


class TestLoopExperts(ExpertsConformance):
    backend = "loop"


class TestTorchRouter(RouterConformance):
    backend = "torch"


class TestTorchPermutation(PermutationConformance):
    backend = "torch"


class TestLocalExchange(ExchangeConformance):
    backend = "local"


class TestSingleStrategy(StrategyConformance):
    backend = "single"
