"""Typed launches: arguments are checked before a kernel is compiled."""

import pytest
import torch
from example_sources import SPLIT

from tokenyard_kernels_cuda.toolchain import Array, Float, Int, Kernel

KERNEL = Kernel(
    SPLIT, "f", x=Array(torch.float32), y=Array(torch.int32, optional=True), n=Int(), a=Float()
)


def arguments(**changes):
    defaults = {"x": torch.zeros(4, 4), "y": None, "n": 3, "a": 0.5}
    return tuple((defaults | changes).values())


@pytest.fixture
def launched(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "tokenyard_kernels_cuda.toolchain._driver.launch", lambda *args: calls.append(args)
    )
    return calls


def test_launch_gets_addresses_and_numbers(launched):
    x = torch.zeros(4, 4)
    y = torch.zeros(2, dtype=torch.int32)
    KERNEL((5, 2), 64, *arguments(x=x, y=y), shared=16)
    KERNEL((5, 2), 64, *arguments(x=x))
    first, second = launched
    assert first[:2] + first[3:6] == (SPLIT, "f", (5, 2, 1), 64, 16)
    assert first[6][0] == (x.data_ptr(), y.data_ptr(), 3, 0.5)
    assert second[6][0] == (x.data_ptr(), 0, 3, 0.5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"x": torch.zeros(4).half()},
            "f: x is torch.float16, and must be a tensor of torch.float32",
        ),
        ({"x": None}, "f: tensors are on 0 devices; they must be on one"),
        ({"x": 7, "y": torch.zeros(1).int()}, "f: x is int, and must be a tensor of torch.float32"),
        ({"x": torch.zeros(4, 4).t()[:2]}, r"f: x has strides \(1, 4\) and must be contiguous"),
        (
            {"y": torch.zeros(1, device="meta").int()},
            "f: tensors are on 2 devices; they must be on one",
        ),
        ({"n": 1 << 31}, "f: n is 2147483648, and must be an integer of 32 bits"),
        ({"n": 1.5}, "f: n is 1.5, and must be an integer of 32 bits"),
        ({"a": "1"}, "f: a is '1', and must be a number"),
    ],
)
def test_wrong_argument_is_a_type_error(launched, changes, sentence):
    with pytest.raises(TypeError, match=sentence):
        KERNEL((1, 1), 32, *arguments(**changes))
    assert not launched


def test_wrong_number_of_arguments_is_a_type_error(launched):
    with pytest.raises(TypeError, match="f takes 4 arguments, and 3 were given"):
        KERNEL((1, 1), 32, *arguments()[:3])


@pytest.mark.parametrize("grid", [(0, 1), (1, 1 << 16), (1 << 31, 1)])
def test_impossible_grid_is_a_value_error(launched, grid):
    with pytest.raises(ValueError, match=r"f: \d+ blocks along [xy]; there may be 1 to \d+"):
        KERNEL(grid, 32, *arguments())
