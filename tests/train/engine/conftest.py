"""A stand-in for CUDA graphs of decoding."""

import pytest

from tokenyard_train.engine import decoding


class Graph:
    """Calls the model in place of a CUDA graph, and counts the captures."""

    captures = 0

    def __init__(self, net, cache, ids):
        type(self).captures += 1
        self.lasting = not decoding._autocast_copies(net)
        self.net = net
        self.fixed = cache.fixed()

    def replay(self, ids):
        logits = self.net(ids, self.fixed).logits[:, -1]
        self.fixed.advance()
        return logits


@pytest.fixture
def graph(monkeypatch):
    """The class of graphs, which works on a CPU."""
    monkeypatch.setattr(Graph, "captures", 0)
    monkeypatch.setattr(decoding, "_Graph", Graph)
    monkeypatch.setattr(decoding, "_can_capture", lambda *_: True)
    return Graph
