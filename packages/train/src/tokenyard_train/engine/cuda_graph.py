"""The forward and backward pass of a microbatch as a CUDA graph.

A graph launches all kernels of a pass at once, so the GPU never waits for the host. Small models
gain most: their kernels take less time than their launches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from tokenyard import ConfigError, moe_layers
from tokenyard.sharded import has_shards
from tokenyard.weight_copies import captured_weight_copies, renew_weight_copies
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.captured_pass import CapturedPass
from tokenyard_train.engine.hooks import Hooks

log = logging.getLogger("tokenyard")

W = TypeVar("W")
T = TypeVar("T")

_EAGER_MICROBATCHES = 1  # before the capture: they compile and load kernels


class MicrobatchGraph:
    """Runs a function of a microbatch, and replays it as a CUDA graph where that is possible.

    The function must write gradients to ``parameter.grad``. A microbatch and the result are pytrees
    of tensors. All microbatches have one shape, and the same values that are not tensors. If the
    capture fails, or the model gets a hook later, which a graph would not call, a warning says so,
    and every microbatch runs without a graph. Hooks that the model has from the start are part of
    its forward pass.

    A pass before the capture runs in the context `warm_up`, and must change nothing in there but
    ``parameter.grad``.

    What expert kernels keep of weights is computed before a replay, if the weights changed.
    The function may have collectives. Then all ranks call this equally often, and `any_rank`
    returns whether its argument is true on any of them: either all ranks capture, or none does.
    None means that there is one rank.
    """

    def __init__(
        self,
        model: nn.Module,
        warm_up: Callable[[], AbstractContextManager[None]] = nullcontext,
        any_rank: Callable[[bool], bool] | None = None,
    ):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.warm_up = warm_up
        self.any_rank = any_rank
        self._hooks = Hooks(model)
        self._layers = moe_layers(model)
        self._eager_left = _EAGER_MICROBATCHES
        self._refused = False
        self._captured: CapturedPass | None = None
        self._agreed = False  # all ranks have captured

    @property
    def captured(self) -> bool:
        """Whether microbatches are replayed."""
        return self._captured is not None

    @property
    def agreed(self) -> bool:
        """Whether all ranks have captured. One may run without its graph since it got a hook."""
        return self._agreed if self.any_rank is not None else self.captured

    def __call__(self, work: W, run: Callable[[W], T], add: bool) -> T:
        """Return ``run(work)``.

        With `add`, gradients are added to those that exist. Otherwise they belong to the graph: the
        next call overwrites them.
        """
        if self._eager_left > 0:
            self._eager_left -= 1
            return run(work)
        if self._captured is None and not self._refused:
            self._capture_or_refuse(work, run)
        elif not self._refused and (reason := self._hooks.changed()) is not None:
            self._refuse(reason)
        if self._captured is None:
            return run(work)
        renew_weight_copies(self._layers)
        result: T = self._captured.replay(work, add)
        return result

    def bytes(self) -> int:
        """Return the memory that the graph keeps for its tensors."""
        if self._captured is None:
            return 0
        pool = self._captured.graph.pool()
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == pool)

    def _capture_or_refuse(self, work: Any, run: Callable[[Any], Any]) -> None:
        """Capture on all ranks, or on none. The pass before the capture has collectives, too."""
        reason = self._hooks.changed()
        failed = self._on_any_rank(reason is not None)
        if not failed:
            reason = self._capture(work, run)
            failed = self._on_any_rank(reason is not None)
        if failed:
            self._refuse(reason or "another rank cannot capture it")
        self._agreed = not failed

    def _on_any_rank(self, flag: bool) -> bool:
        return flag if self.any_rank is None else self.any_rank(flag)

    def _capture(self, work: Any, run: Callable[[Any], Any]) -> str | None:
        """Capture a graph; return why it failed, or None."""
        device = self.parameters[0].device
        gradients = [parameter.grad for parameter in self.parameters]
        # The capture draws random numbers. Later draws must not depend on it.
        random_state = torch.cuda.get_rng_state(device)
        captured = CapturedPass(self.parameters, work)
        try:
            with captured_weight_copies(self._layers):
                captured.warm_up(run, self.warm_up)
                captured.capture(run)
            self._captured = captured
        except RuntimeError as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            if out_of_memory and self.any_rank is not None and not captured.warm:
                raise  # other ranks are in the collectives of this pass
            return " ".join(str(error).split())[:200]
        finally:
            torch.cuda.set_rng_state(random_state, device)
            for parameter, gradient in zip(self.parameters, gradients):
                parameter.grad = gradient
        return None

    def _refuse(self, reason: str) -> None:
        self._captured = None
        self._refused = True
        log.warning("steps run without a CUDA graph (%s); set cuda_graph: false", reason)


def why_no_graph(config: TrainConfig, model: nn.Module, ranks: int) -> str | None:
    """Return why a run of `ranks` data ranks cannot use a CUDA graph, or None."""
    if not config.device.startswith("cuda"):
        return f"device is {config.device}"
    if ranks > 1 and has_shards(model):
        return f"the model is sharded over {ranks} ranks"
    if config.activation_cpu_offload:
        return "activation_cpu_offload is true"
    return None


def uses_graph(config: TrainConfig, model: nn.Module, ranks: int) -> bool:
    """Return whether a run of `ranks` data ranks uses CUDA graphs.

    Raises ConfigError if it cannot and `cuda_graph` is true.
    """
    reason = why_no_graph(config, model, ranks)
    if config.cuda_graph is True and reason is not None:
        raise ConfigError(f"cuda_graph is true, and {reason}; give auto, which then uses none")
    return bool(config.cuda_graph) and reason is None
