"""A layer's times where launching counts: from an idle GPU, on the host, and as CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from tokenyard.measure.launching import IdleClock, graph_of, host_times
from tokenyard.measure.timing import Spread, Stages, clock_for, measure
from tokenyard_bench.sweep import Sweep, release_memory
from tokenyard_cli.results import Record

log = logging.getLogger("tokenyard")


def launch_times(sweep: Sweep, layers: Mapping[str, Stages]) -> dict[str, Record]:
    """Return for each layer, whose stages are the forward and the backward pass, its times in ms.

    - `idle`: forward pass, and forward and backward pass, on a GPU that is idle before.
    - `host`: until the host has launched them.
    - `graph`: as CUDA graphs, the forward pass without autograd; None if they cannot be captured.
    """
    idle = measure(layers, IdleClock(sweep.device), sweep.repetitions)
    host = {name: host_times(stages, sweep.repetitions) for name, stages in layers.items()}
    graphed = _graph_times(sweep, layers)  # last: a failed capture can make the GPU unusable
    return {
        name: {
            "idle": medians(idle[name]),
            "host": medians(host[name]),
            "graph": {key: _median(graphed.get(f"{name} {key}")) for key in ("forward", "step")},
        }
        for name in layers
    }


def _graph_times(sweep: Sweep, layers: Mapping[str, Stages]) -> dict[str, list[Spread]]:
    """Return the times of the layers that can be captured, none if one breaks the GPU's context."""
    graphs: dict[str, Stages] = {}
    try:
        for name, stages in layers.items():
            graphs |= _graphs(name, stages, sweep.device)
        return measure(graphs, clock_for(sweep.device), sweep.repetitions)
    except RuntimeError as error:
        log.warning("CUDA graphs are not measured: %s", str(error).partition("\n")[0])
        return {}


def _graphs(name: str, stages: Stages, device: torch.device) -> dict[str, Stages]:
    """Return the forward pass and the whole step as CUDA graphs; none if one cannot be captured."""
    try:
        with torch.no_grad():
            forward = graph_of(stages[:1], device)
        return {f"{name} forward": forward, f"{name} step": graph_of(stages, device)}
    except RuntimeError as error:  # a layer that waits for the device
        log.warning("%s is not captured as a CUDA graph: %s", name, str(error).partition("\n")[0])
        release_memory()
        return {}


def medians(spreads: list[Spread]) -> dict[str, float | None]:
    """Return the medians of a forward pass, and of forward and backward, in ms."""
    return {"forward": spreads[0].median, "step": spreads[1].median}


def _median(spreads: list[Spread] | None) -> float | None:
    return None if spreads is None else spreads[0].median
