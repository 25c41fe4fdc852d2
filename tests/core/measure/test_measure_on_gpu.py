"""CUDA events, flushed caches, kernel launches, host syncs and peak memory."""

import pytest
import torch

from tokenyard.measure.memory import peak_bytes
from tokenyard.measure.timing import CudaClock, measure
from tokenyard.measure.trace import trace

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    return torch.device("cuda")


def test_events_measure_the_work_of_the_device(device):
    a = torch.randn(4096, 4096, device=device)
    works = {"one": (lambda _: a @ a,), "four": (lambda _: [a @ a for _ in range(4)],)}
    spreads = measure(works, CudaClock(device), repetitions=9)
    assert spreads["four"][0].median == pytest.approx(4 * spreads["one"][0].median, rel=0.25)


def test_launches_and_waits_are_counted(device):
    x = torch.randn(1000, device=device)
    torch.cuda.synchronize()
    calm = trace((lambda _: x.sin().cos(),), device)
    assert (calm.launches, calm.waits) == (2, 0)
    asking = trace((lambda _: x.sin().sum().item(),), device)
    assert asking.waits == 1
    assert asking.wait_ms > calm.wait_ms == 0
    assert all(kernel.milliseconds > 0 for kernel in asking.kernels)


def test_peak_bytes_are_the_allocator_s(device):
    def work(_):
        torch.empty(1 << 24, device=device).sum()

    assert 1 << 26 <= peak_bytes((work,), device) < (1 << 26) + (1 << 22)
