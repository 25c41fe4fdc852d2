"""What a CUDA graph that cannot be captured leaves behind."""

import gc
import weakref

import pytest
import torch

from tokenyard.capture import capture

pytestmark = pytest.mark.gpu


def drawing():
    """A graph of one draw, and what it draws."""
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        drawn = torch.rand(64, device="cuda")
    return graph, drawn


def fail():
    """Draw in a capture, and wait for the GPU, which no capture survives."""
    error = pytest.raises(RuntimeError, match="not permitted when stream is capturing")
    with error, capture(torch.cuda.CUDAGraph()):
        torch.rand(64, device="cuda").sum().item()


@pytest.fixture
def wanted():
    torch.cuda.manual_seed(1)
    return [torch.rand(64, device="cuda") for _ in range(3)]


def test_graphs_from_before_and_after_draw_as_the_process_does(wanted):
    before, first = drawing()
    fail()
    after, second = drawing()
    torch.cuda.manual_seed(1)
    before.replay()
    after.replay()
    third = torch.rand(64, device="cuda")
    for got, draw in zip((first, second, third), wanted, strict=True):
        assert torch.equal(got, draw)


def test_the_stream_is_that_of_before():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fail()
        assert torch.cuda.current_stream() == stream


def test_memory_that_two_streams_used_is_freed():
    """The allocator defers this while it believes that a graph is captured."""
    fail()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    both = torch.empty(1 << 24, device="cuda")
    both.record_stream(torch.cuda.Stream())
    del both
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")  # the allocator looks for what has ended
    assert torch.cuda.memory_allocated() == before


def fail_with_work():
    """Fail within autograd; return a weak reference to a result."""
    weight = torch.ones(4, device="cuda", requires_grad=True)
    try:
        with capture(torch.cuda.CUDAGraph()):
            product = weight * 2
            freed = weakref.ref(product)
            product.sum().item()
    except RuntimeError:
        return freed


def test_the_captured_work_is_freed():
    """At once: what autograd keeps of it belongs to the stream of the capture."""
    gc.collect()
    gc.disable()
    try:
        assert fail_with_work()() is None
    finally:
        gc.enable()


def test_other_errors_of_the_captured_work_are_raised():
    with pytest.raises(ZeroDivisionError), capture(torch.cuda.CUDAGraph()):
        torch.rand(64, device="cuda") / (1 // 0)
    assert torch.rand(64, device="cuda").isfinite().all()
