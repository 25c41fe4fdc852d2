"""Which error a failed capture raises. `torch.cuda.graph` is replaced: there is no GPU."""

from contextlib import contextmanager

import pytest
import torch

from tokenyard import capture as module
from tokenyard.capture import capture


class Graph:
    """A graph, which has a pool if its capture could be ended."""

    def __init__(self, ends):
        self.ends = ends

    def pool(self):
        if not self.ends:
            raise RuntimeError("no capture has ended")


@pytest.fixture(autouse=True)
def cleaned(monkeypatch):
    """Replace the GPU; return the graphs that were cleaned up."""

    @contextmanager
    def captured(graph, pool):
        try:
            yield
        finally:
            if not graph.ends:
                raise RuntimeError("the capture failed before")

    graphs = []
    monkeypatch.setattr(torch.cuda, "graph", captured)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(module, "_clean_up", lambda graph, *_: graphs.append(graph))
    return graphs


@pytest.mark.parametrize("ends", [True, False])
def test_the_error_of_the_block_is_raised_with_its_own_causes(cleaned, ends):
    why, before = KeyError("why"), IndexError("before")
    error = ValueError("in the block")
    error.__context__ = before
    graph = Graph(ends)
    with pytest.raises(ValueError, match="in the block") as raised, capture(graph):
        raise error from why
    assert raised.value is error
    assert (error.__cause__, error.__context__) == (why, before)
    assert cleaned == ([] if ends else [graph])


def test_without_an_error_in_the_block_that_of_the_end_is_raised(cleaned):
    graph = Graph(ends=False)
    with pytest.raises(RuntimeError, match="the capture failed before"), capture(graph):
        pass
    assert cleaned == [graph]
