"""The Triton backends pass core's kit: in the interpreter on a CPU, and on a GPU as they are."""

import pytest

from tokenyard.testing import ExpertsConformance, PermutationConformance, RouterConformance


class TestTritonExperts(ExpertsConformance):
    backend = "triton"
    tile = 32


class TestTritonPermutation(PermutationConformance):
    backend = "triton"


class TestTritonRouter(RouterConformance):
    backend = "triton"
