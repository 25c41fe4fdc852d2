"""Times of launches; without a GPU."""

import logging

import torch

from tokenyard_bench import launch_times


def test_a_layer_that_cannot_be_captured_is_named(monkeypatch, caplog):
    """Else an empty column is the only sign of a fault."""

    def graph_of(stages, device):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(launch_times, "graph_of", graph_of)
    with caplog.at_level(logging.WARNING, "tokenyard"):
        assert launch_times._graphs("loop", (), torch.device("cpu")) == {}
    assert caplog.messages == ["loop is not captured as a CUDA graph: operation not permitted"]
