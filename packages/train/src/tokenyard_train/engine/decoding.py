"""One decoding step after another, as a CUDA graph where a model and its cache can be captured."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tokenyard import Model, moe_layers, started_processes
from tokenyard.adapter import LoraAdapter
from tokenyard.capture import capture
from tokenyard.sharded import local_part
from tokenyard.weight_copies import captured_weight_copies, renew_weight_copies

log = logging.getLogger("tokenyard")

_FEWEST = 16  # steps for which a graph is captured, which takes as long as some of them


class DecodingStep:
    """Calls a model with the next ids of its cache, and returns the logits [B, V] of the last.

    Call `begin`, then this with a prompt, then with one id a row. On a GPU, a call with one id is
    captured once and replayed, if the cache has the method ``fixed`` (see ``Model.new_cache``): the
    host then launches one graph instead of each kernel. A model that cannot be captured, because it
    waits for the device, is called each time.

    A later `begin` replays the same graph, with what the cache holds then. It reads weights where
    they are, so it sees those that changed in place. Hooks that a module got since are not called.
    """

    def __init__(self, model: Model, cache: Any, capacity: int):
        self.cache = cache
        self.capacity = capacity  # tokens of a row that the cache has room for
        self._model = model
        self._setting = _setting(model)
        self._graph: _Graph | None = None
        self._refused = False
        self._can_capture = False
        self._calls = 0

    def serves(self, model: Model) -> bool:
        """Return whether it can begin again: no weight has moved, and the modes are the same."""
        return model is self._model and _setting(model) == self._setting

    def begin(self, steps: int) -> None:
        """Begin a text of so many steps after what the cache holds."""
        if self._graph is not None and not self._graph.lasting:
            self._graph = None
        self._can_capture = not self._refused and _can_capture(self._model, self.cache, steps)
        self._calls = 0

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the logits [B, V] after ids [B, S]."""
        self._calls += 1
        if self._calls == 2:
            self._prepare_graph(ids)
        if self._calls > 1 and self._graph is not None:
            return self._graph.replay(ids)
        logits: Tensor = self._model(ids, self.cache).logits
        return logits[:, -1]

    def _prepare_graph(self, ids: Tensor) -> None:
        """Let a graph that exists go on from the cache, or capture one."""
        if self._graph is not None:
            renew_weight_copies(moe_layers(self._model))
            self.cache.fixed()
        elif self._can_capture:
            self._graph = _captured(self._model, self.cache, ids)
            self._refused = self._graph is None


class _Graph:
    """A captured call of a model. Its memory is that of the graph."""

    def __init__(self, model: Model, cache: Any, ids: Tensor):
        self.lasting = not _autocast_copies(model)
        self.ids = ids.clone()
        fixed = cache.fixed()
        self._fixed = fixed  # a cache need not keep it, and replays use its memory
        # Compile, and record launches; each writes the same position. Not on a stream of its own,
        # for which cuBLAS would keep a workspace of 32 MiB.
        for _ in range(3):
            model(self.ids, fixed)
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
        with captured_weight_copies(moe_layers(model)):
            return _Graph(model, cache, ids)
    except RuntimeError as error:
        log.warning("text is generated without a CUDA graph: %s", str(error).partition("\n")[0])
        return None


def _setting(model: Model) -> list[object]:
    """Return what a step depends on: modes of torch, settings, and where weights and buffers are.

    Inference mode makes tensors that nothing outside of it can write to. An address alone may be
    that of another tensor by now.
    """
    kind = next(model.parameters()).device.type
    autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
    modes = (torch.is_inference_mode_enabled(), torch.backends.cuda.matmul.fp32_precision)
    setting: list[object] = [autocast, modes]
    setting += [module.settings for module in model.modules() if isinstance(module, LoraAdapter)]
    for tensor in (*model.parameters(), *model.buffers()):
        local = local_part(tensor)
        layout = (local.dtype, local.shape, local.stride())
        setting.append((StorageWeakRef(local.untyped_storage()), local.data_ptr(), layout))
    return setting


def _autocast_copies(model: Model) -> bool:
    """Return whether autocast keeps copies of weights, which a graph reads, until its end."""
    kind = next(model.parameters()).device.type
    if not (torch.is_autocast_enabled(kind) and torch.is_autocast_cache_enabled()):
        return False
    return any(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
