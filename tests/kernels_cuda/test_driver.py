"""Calls of the CUDA driver, recorded by a fake driver, since a CPU machine has none."""

from struct import Struct

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")

from cuda.bindings import driver

from tokenyard_kernels_cuda.toolchain import DriverError, Source, _driver

OK = driver.CUresult.CUDA_SUCCESS
INVALID = driver.CUresult.CUDA_ERROR_INVALID_VALUE
SOURCE = Source("split.cu", (("ELEMENT", "bf16"),))
VALUES = (1 << 40, 7, 0.5, 1 << 41)
LAYOUT = Struct("@PifP")


@pytest.fixture
def fake_driver(monkeypatch):
    """Fake the driver and torch's current GPU; return its calls and a way to fake more."""
    calls = []

    def fake(name, *result):
        monkeypatch.setattr(
            driver, name, lambda *arguments: calls.append((name, *arguments)) or result
        )

    fake("cuCtxGetCurrent", OK, driver.CUcontext(1))
    fake("cuDevicePrimaryCtxRetain", OK, driver.CUcontext(2))
    fake("cuCtxSetCurrent", OK)
    fake("cuLibraryLoadData", OK, driver.CUlibrary(3))
    fake("cuLibraryGetKernel", OK, driver.CUkernel(4))
    fake("cuKernelGetFunction", OK, driver.CUfunction(5))
    fake_launch(monkeypatch, calls, 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 99, raising=False)
    monkeypatch.setattr(_driver, "_thread", _driver._Thread())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_driver, "cubin_of", lambda source, architecture: architecture.encode())
    for cached in (_driver.function, _driver._library, _driver._can_chain):
        cached.cache_clear()
    yield calls, fake
    for cached in (_driver.function, _driver._library, _driver._can_chain):
        cached.cache_clear()


def fake_launch(monkeypatch, calls, result):
    def launch_kernel(function, *arguments):
        calls.append(("launch", function.value, *arguments))
        return result

    monkeypatch.setattr(_driver, "launch_kernel", launch_kernel)


def launch():
    _driver.launch(SOURCE, "split_in_two", 0, (5, 2, 1), 64, 16, (VALUES, LAYOUT))


def test_kernel_is_loaded_once_and_launched_on_torch_s_stream(fake_driver):
    calls, _ = fake_driver
    launch()
    launch()
    names = [call[0] for call in calls]
    assert names.count("cuLibraryLoadData") == names.count("cuKernelGetFunction") == 1
    launched = ("launch", 5, (5, 2, 1, 64, 1, 1, 16), 99, LAYOUT, VALUES, True)
    assert [call for call in calls if call[0] == "launch"] == [launched] * 2
    assert next(call[1] for call in calls if call[0] == "cuLibraryLoadData") == b"sm_90a"


def test_thread_without_a_context_gets_torch_s(fake_driver):
    calls, fake = fake_driver
    fake("cuCtxGetCurrent", OK, driver.CUcontext(0))
    launch()
    launch()
    (call,) = [call for call in calls if call[0] == "cuCtxSetCurrent"]
    assert int(call[1]) == 2


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
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
def test_driver_error_names_the_call_and_the_kernel(fake_driver, name, sentence):
    _, fake = fake_driver
    fake(name, INVALID, 0)
    with pytest.raises(DriverError, match=sentence):
        launch()


def test_refused_launch_names_the_kernel(fake_driver, monkeypatch):
    fake_launch(monkeypatch, [], int(INVALID))
    sentence = r"the CUDA driver refuses to launch split_in_two \(CUDA_ERROR_INVALID_VALUE\)"
    with pytest.raises(DriverError, match=sentence):
        launch()
