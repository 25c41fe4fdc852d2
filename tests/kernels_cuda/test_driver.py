"""What is asked of the CUDA driver, by a driver that only takes notes: there is none on a CPU."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")

from cuda.bindings import driver

from tokenyard_kernels_cuda.toolchain import DriverError, Source, _driver

OK, GONE = driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_INVALID_VALUE
SOURCE = Source("split.cu", (("ELEMENT", "bf16"),))
ARGUMENTS = ((0, 7, 0.5), (ctypes.c_void_p, ctypes.c_int, ctypes.c_float))


@pytest.fixture
def notes(monkeypatch):
    """Replace the driver and torch's view of a GPU; return what was called, in order."""
    called = []

    def noted(name, *result):
        monkeypatch.setattr(
            driver, name, lambda *arguments: called.append((name, *arguments)) or result
        )

    noted("cuCtxGetCurrent", OK, driver.CUcontext(1))
    noted("cuDevicePrimaryCtxRetain", OK, driver.CUcontext(2))
    noted("cuCtxSetCurrent", OK)
    noted("cuLibraryLoadData", OK, driver.CUlibrary(3))
    noted("cuLibraryGetKernel", OK, driver.CUkernel(4))
    noted("cuKernelGetFunction", OK, driver.CUfunction(5))
    noted("cuLaunchKernel", OK)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=99)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_driver, "cubin_of", lambda source, architecture: architecture.encode())
    for cached in (_driver.function, _driver._library):
        cached.cache_clear()
    yield called, noted
    for cached in (_driver.function, _driver._library):
        cached.cache_clear()


def launch():
    _driver.launch(SOURCE, "split_in_two", 0, (5, 2, 1), 64, 16, ARGUMENTS)


def test_a_kernel_is_loaded_once_and_launched_on_torch_s_stream(notes):
    called, _ = notes
    launch()
    launch()
    names = [call[0] for call in called]
    assert names.count("cuLibraryLoadData") == names.count("cuKernelGetFunction") == 1
    assert names.count("cuLaunchKernel") == 2
    _, function, *sizes, shared, stream, arguments, _ = next(
        c for c in called if c[0] == "cuLaunchKernel"
    )
    assert (int(function), sizes, shared, int(stream)) == (5, [5, 2, 1, 64, 1, 1], 16, 99)
    assert arguments == ARGUMENTS
    assert next(call[1] for call in called if call[0] == "cuLibraryLoadData") == b"sm_90a"


def test_a_thread_without_a_context_gets_torch_s(notes):
    called, noted = notes
    noted("cuCtxGetCurrent", OK, driver.CUcontext(0))
    launch()
    (given,) = [call for call in called if call[0] == "cuCtxSetCurrent"]
    assert int(given[1]) == 2


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "cuLaunchKernel",
            r"the CUDA driver refuses to launch split_in_two \(CUDA_ERROR_INVALID_VALUE\)",
        ),
        (
            "cuLibraryLoadData",
            r"to load split.cu \(ELEMENT=bf16\), compiled for sm_90a, \(CUDA_ERROR_INVALID_VALUE\)",
        ),
        (
            "cuKernelGetFunction",
            r"to load split_in_two of split.cu \(ELEMENT=bf16\) \(CUDA_ERROR_INVALID_VALUE\)",
        ),
        (
            "cuLibraryGetKernel",
            r"to find split_in_two in split.cu \(ELEMENT=bf16\) \(CUDA_ERROR_INVALID_VALUE\)",
        ),
    ],
)
def test_what_the_driver_refuses_is_said(notes, name, sentence):
    _, noted = notes
    noted(name, GONE, 0)
    with pytest.raises(DriverError, match=sentence):
        launch()
