"""The backends pass core's kit: Triton's on a CPU in the interpreter, all of them on a GPU."""

import pytest

from tokenyard.testing import ExpertsConformance, PermutationConformance, TopKRouterConformance


class TestTritonExperts(ExpertsConformance):
    backend = "triton"
    tile = 32


@pytest.mark.gpu
class TestTritonExpertsFp8(ExpertsConformance):
    backend = "triton"
    options = {"save": "fp8"}
    quantised = True
    tile = 32


@pytest.mark.gpu
class TestTritonExpertsRecompute(ExpertsConformance):
    backend = "triton"
    options = {"save": "recompute"}
    tile = 32


class TestSparseExperts(ExpertsConformance):
    backend = "sparse"
    tile = 64
    ffn_dim = 192


@pytest.mark.gpu
class TestSparseExpertsOfWideBlocks(ExpertsConformance):
    backend = "sparse"
    tile = 128
    dim = 330
    ffn_dim = 512


class TestTritonPermutation(PermutationConformance):
    backend = "triton"


class TestTritonRouter(TopKRouterConformance):
    backend = "triton"


@pytest.mark.gpu
class TestGluonExperts(ExpertsConformance):
    backend = "gluon"
    tile = 128


@pytest.fixture
def never_few_rows(monkeypatch):
    """Let the kernels for many rows compute the kit's small batches, too."""
    from tokenyard_kernels_triton.ops import _kernel_set

    monkeypatch.setattr(_kernel_set, "MOST_FEW_ROWS", 0)


@pytest.mark.gpu
@pytest.mark.usefixtures("never_few_rows")
class TestGluonExpertsOfManyRows(ExpertsConformance):
    backend = "gluon"
    tile = 128


@pytest.mark.gpu
@pytest.mark.usefixtures("never_few_rows")
class TestTritonExpertsOfManyRows(ExpertsConformance):
    backend = "triton"
    tile = 128


@pytest.mark.gpu
class TestGluonExpertsFp8(ExpertsConformance):
    backend = "gluon"
    options = {"save": "fp8"}
    quantised = True
    tile = 128


@pytest.mark.gpu
class TestGluonExpertsRecompute(ExpertsConformance):
    backend = "gluon"
    options = {"save": "recompute"}
    tile = 128


@pytest.mark.gpu
class TestGluonExpertsOfManySlices(ExpertsConformance):
    backend = "gluon"
    tile = 128
    dim = 328
    ffn_dim = 456


@pytest.mark.gpu
class TestTritonExpertsOfManySlices(ExpertsConformance):
    backend = "triton"
    tile = 128
    dim = 330
    ffn_dim = 452
