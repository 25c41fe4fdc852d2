"""Times of launches; without a GPU."""

import logging

import torch

from tokenyard_bench import launch_times
from tokenyard_bench.shapes import Shape
from tokenyard_bench.sweep import Sweep


def test_a_layer_that_cannot_be_captured_is_named(monkeypatch, caplog):
    """Else an empty column is the only sign of a fault."""

    def graph_of(stages, device):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(launch_times, "graph_of", graph_of)
    with caplog.at_level(logging.WARNING, "tokenyard"):
        assert launch_times._graphs("loop", (), torch.device("cpu")) == {}
    assert caplog.messages == ["loop is not captured as a CUDA graph: operation not permitted"]


def test_a_capture_that_breaks_the_gpu_costs_the_times_of_graphs_only(monkeypatch, caplog):
    """Every later call to the GPU raises then, also those that free memory."""

    def broken(*_):
        raise torch.AcceleratorError("an illegal instruction was encountered\nSearch for it")

    monkeypatch.setattr(launch_times, "IdleClock", launch_times.clock_for)
    monkeypatch.setattr(launch_times, "host_times", lambda stages, _: [spread, spread])
    monkeypatch.setattr(launch_times, "graph_of", broken)
    monkeypatch.setattr(launch_times, "release_memory", broken)
    sweep = Sweep([Shape("small", 8, 8, 8, 2, 1)], ["fp32"], ["natural"], torch.device("cpu"))
    spread = launch_times.Spread(2.0, 1.0, 3.0, 3)
    with caplog.at_level(logging.WARNING, "tokenyard"):
        times = launch_times.launch_times(sweep, {"peer": (lambda _: 0, lambda _: 0)})
    assert times["peer"]["host"] == {"forward": 2.0, "step": 2.0}
    assert times["peer"]["idle"]["forward"] > 0
    assert times["peer"]["graph"] == {"forward": None, "step": None}
    assert caplog.messages[-1] == (
        "CUDA graphs are not measured: an illegal instruction was encountered"
    )
