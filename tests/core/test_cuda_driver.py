"""A launch gives the CUDA driver its sizes, stream, arguments and attributes; without a GPU."""

import ctypes
from struct import Struct

import pytest

from tokenyard import TokenyardError, cuda_driver

CODES = ("P", "i", "f", "P", "128s", "b")
LAYOUT = cuda_driver.argument_layout(CODES)
VALUES = (1 << 40, 7, 0.5, 1 << 41, bytes(range(128)), -3)
SIZES = (5, 2, 1, 64, 1, 1, 16)


@pytest.fixture
def driver(monkeypatch):
    """Replace the driver. Return what its calls get."""
    calls = []

    def launch(config, function, addresses, extra):
        *sizes, stream, attributes, count = Struct("@7IPPI").unpack_from(config)
        attribute = Struct("@IiQ").unpack(ctypes.string_at(attributes, 16)) if count else None
        assert extra is None
        arguments = tuple(
            Struct(code).unpack(ctypes.string_at(address, Struct(code).size))[0]
            for code, address in zip(CODES, addresses)
        )
        calls.append((function.value, tuple(sizes), stream, arguments, attribute))
        return 0 if stream else 1

    monkeypatch.setattr(cuda_driver, "_launch_function", lambda: launch)
    return calls


def test_launch(driver):
    result = cuda_driver.launch_kernel(ctypes.c_void_p(9), SIZES, 3, LAYOUT, VALUES)
    assert result == 0
    assert driver == [(9, SIZES, 3, VALUES, None)]


def test_chained_launch_has_the_attribute(driver):
    cuda_driver.launch_kernel(ctypes.c_void_p(9), SIZES, 3, LAYOUT, VALUES, chained=True)
    assert driver == [(9, SIZES, 3, VALUES, (6, 0, 1))]


def test_result_is_the_driver_s(driver):
    assert cuda_driver.launch_kernel(ctypes.c_void_p(9), SIZES, 0, LAYOUT, VALUES) == 1


@pytest.mark.parametrize("library", [object(), None], ids=["old driver", "none"])
def test_without_the_driver_s_function_a_sentence_says_so(monkeypatch, library):
    def load(name):
        if library is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", load)
    cuda_driver._launch_function.cache_clear()
    assert not cuda_driver.has_driver()
    with pytest.raises(TokenyardError, match=r"cuLaunchKernelEx .* from version 11\.8 on"):
        cuda_driver.launch_kernel(ctypes.c_void_p(9), SIZES, 3, LAYOUT, VALUES)
