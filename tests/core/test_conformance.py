"""Core's own backends pass the conformance kit, on the CPU and on a GPU."""

import pytest

from tokenyard.testing import (
    ExchangeConformance,
    ExpertsConformance,
    PermutationConformance,
    StrategyConformance,
    TopKRouterConformance,
)


class TestTorchExperts(ExpertsConformance):
    backend = "torch"
    device = "cpu"


class TestCpuExperts(ExpertsConformance):
    backend = "cpu"
    device = "cpu"


class TestLoopExperts(ExpertsConformance):
    backend = "loop"
    device = "cpu"


class TestTorchRouter(TopKRouterConformance):
    backend = "torch"
    device = "cpu"


class TestTorchPermutation(PermutationConformance):
    backend = "torch"
    device = "cpu"


class TestLocalExchange(ExchangeConformance):
    backend = "local"
    device = "cpu"


class TestSingleStrategy(StrategyConformance):
    backend = "single"
    device = "cpu"


@pytest.mark.gpu
class TestTorchExpertsOnGpu(ExpertsConformance):
    backend = "torch"
    device = "cuda"


@pytest.mark.gpu
class TestTorchRouterOnGpu(TopKRouterConformance):
    backend = "torch"
    device = "cuda"


@pytest.mark.gpu
class TestTorchPermutationOnGpu(PermutationConformance):
    backend = "torch"
    device = "cuda"


@pytest.mark.gpu
class TestLocalExchangeOnGpu(ExchangeConformance):
    backend = "local"
    device = "cuda"


@pytest.mark.gpu
class TestSingleStrategyOnGpu(StrategyConformance):
    backend = "single"
    device = "cuda"
