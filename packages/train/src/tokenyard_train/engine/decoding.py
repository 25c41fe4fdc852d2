"""One decoding step after another, as a CUDA graph where a model and its cache can be captured."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from tokenyard import Model, started_processes
from tokenyard.capture import capture
from tokenyard.weight_copies import captured_weight_copies

log = logging.getLogger("tokenyard")

_FEWEST = 16  # steps for which a graph is captured, which takes as long as some of them


class DecodingStep:
    """Calls a model with the next ids of its cache, and returns the logits [B, V] of the last.

    On a GPU, a call with one id a row is captured once and replayed, if the cache has the method
    ``fixed`` (see ``Model.new_cache``): the host then launches one graph instead of each kernel.
    A model that cannot be captured, because it waits for the device, is called each time.
    """

    def __init__(self, model: Model, cache: Any, steps: int):
        self._model = model
        self._cache = cache
        self._can_capture = _can_capture(model, cache, steps)
        self._graph: _Graph | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the logits [B, V] after ids [B, S]."""
        if self._graph is None and ids.shape[1] == 1 and self._can_capture:
            self._can_capture = False
            self._graph = _captured(self._model, self._cache, ids)
        if self._graph is not None:
            return self._graph.replay(ids)
        logits: Tensor = self._model(ids, self._cache).logits
        return logits[:, -1]


class _Graph:
    """A captured call of a model. Its memory is that of the graph."""

    def __init__(self, model: Model, cache: Any, ids: Tensor):
        self.ids = ids.clone()
        fixed = cache.fixed()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compile, and record launches; each writes the same position
                model(self.ids, fixed)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with capture(self.graph):
            self.logits: Tensor = model(self.ids, fixed).logits[:, -1]
            fixed.advance()

    def replay(self, ids: Tensor) -> Tensor:
        """Return the logits [B, V] after ids [B, 1], until the next replay."""
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits


def _can_capture(model: Model, cache: Any, steps: int) -> bool:
    on_gpu = next(model.parameters()).is_cuda
    return on_gpu and steps >= _FEWEST and hasattr(cache, "fixed") and started_processes() == 1


def _captured(model: Model, cache: Any, ids: Tensor) -> _Graph | None:
    """Return a captured call; None if it cannot be captured.

    What expert kernels keep of weights is computed once: weights do not change between two tokens.
    """
    try:
        with captured_weight_copies(model):
            return _Graph(model, cache, ids)
    except RuntimeError as error:
        log.warning("text is generated without a CUDA graph: %s", str(error).partition("\n")[0])
        return None
