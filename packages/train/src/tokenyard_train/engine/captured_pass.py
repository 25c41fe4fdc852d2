"""A forward and backward pass that was captured as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tokenyard.capture import capture
from tokenyard.recompute_rng import RecomputeRng


class CapturedPass:
    """A captured graph with its input, its result and its gradients.

    Call `warm_up`, then `capture`, then `replay` for each microbatch.
    """

    def __init__(self, parameters: list[nn.Parameter], work: Any):
        self.parameters = parameters
        self.device = parameters[0].device
        self.work = tree_map_only(Tensor, torch.clone, work)
        self.graph = torch.cuda.CUDAGraph()
        self.rng = RecomputeRng(torch.cuda.default_generators[self.device.index])
        self.warm = False
        self.result: Any = None
        self.gradients: list[Tensor | None] = []

    def warm_up(
        self, run: Callable[[Any], Any], context: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Run a pass on another stream, as the capture is.

        A host sync is an error here, whose message says so. Within the capture, it would be an
        error of CUDA.
        """
        self._clear_gradients()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream), _host_syncs_are_errors(), context(), self.rng.recording():
            run(self.work)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.warm = True

    def capture(self, run: Callable[[Any], Any]) -> None:
        """Capture a pass."""
        self._clear_gradients()
        self.rng.register(self.graph)
        with capture(self.graph), self.rng.capturing():
            self.result = run(self.work)
        self.gradients = [parameter.grad for parameter in self.parameters]

    def replay(self, work: Any, add: bool) -> Any:
        """Run the graph on a microbatch, and give each parameter its gradient."""
        for static, value in zip(tree_leaves(self.work), tree_leaves(work), strict=True):
            if isinstance(static, Tensor):
                static.copy_(value)
        self.rng.rewind()
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients):
            if gradient is None:
                continue
            if not add:
                parameter.grad = gradient
            elif parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad += gradient
        return tree_map_only(Tensor, torch.clone, self.result)

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


@contextmanager
def _host_syncs_are_errors() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_mode("error")
    try:
        yield
    finally:
        _set_sync_mode(before)


def _set_sync_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode(mode)
