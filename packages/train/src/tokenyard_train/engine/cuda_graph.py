"""The forward and backward pass of a microbatch as a CUDA graph.

A graph launches all kernels of a pass at once, so the GPU never waits for the host. Small models
gain most: their kernels take less time than their launches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

log = logging.getLogger("tokenyard")

T = TypeVar("T")

_EAGER = 1  # microbatches before the capture: they compile and load kernels


class MicrobatchGraph:
    """Runs a function of a microbatch, and replays it as a CUDA graph where that is possible.

    The function must write gradients to ``parameter.grad`` and return a pytree of tensors. All
    microbatches have one shape. If the capture fails, a warning says why, and every microbatch runs
    without a graph.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.eager_left: float = _EAGER
        self._captured: _Captured | None = None

    def __call__(self, rows: Tensor, run: Callable[[Tensor], T], add: bool) -> T:
        """Return ``run(rows)``.

        With `add`, gradients are added to those that exist. Otherwise they belong to the graph: the
        next call overwrites them.
        """
        if self._captured is None and self.eager_left <= 0:
            self._capture(rows, run)
        if self._captured is None:
            self.eager_left -= 1
            return run(rows)
        result: T = self._captured.replay(rows, add)
        return result

    def bytes(self) -> int:
        """Return the memory that the graph keeps for its tensors."""
        if self._captured is None:
            return 0
        pool = self._captured.graph.pool()
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == pool)

    def _capture(self, rows: Tensor, run: Callable[[Tensor], T]) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [parameter.grad for parameter in parameters]
        # The capture draws random numbers; what follows must not depend on it.
        generator = torch.cuda.get_rng_state(rows.device)
        hooked = _hooked_module(self.model)
        try:
            if hooked is not None:
                raise RuntimeError(f"{hooked} has a forward hook, which a graph would not call")
            self._captured = _Captured(parameters, rows, run)
        except RuntimeError as error:
            self.eager_left = float("inf")
            reason = " ".join(str(error).split())[:200]
            log.warning("steps run without a CUDA graph (%s); set cuda_graph: false", reason)
        finally:
            torch.cuda.set_rng_state(generator, rows.device)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient


class _Captured:
    """A captured graph with its input, its result and its gradients."""

    def __init__(self, parameters: list[nn.Parameter], rows: Tensor, run: Callable[[Tensor], Any]):
        self.parameters = parameters
        self.rows = rows.clone()
        self.graph = torch.cuda.CUDAGraph()
        self._forget_gradients()
        # On another stream than the eager passes, as the capture is
        stream = torch.cuda.Stream(rows.device)
        stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(stream):
            run(self.rows)
        torch.cuda.current_stream(rows.device).wait_stream(stream)
        self._forget_gradients()
        with torch.cuda.graph(self.graph):
            self.result = run(self.rows)
        self.gradients = [parameter.grad for parameter in parameters]

    def replay(self, rows: Tensor, add: bool) -> Any:
        """Run the graph on rows, and give each parameter its gradient."""
        self.rows.copy_(rows)
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
        return tree_map(torch.clone, self.result)

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _hooked_module(model: nn.Module) -> str | None:
    """Return the name of the first module with a forward hook, if there is one."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return name or "the model"
    return None
