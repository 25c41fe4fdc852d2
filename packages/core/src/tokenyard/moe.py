"""The MoE layer: a router, its experts, and what every token gets besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenyard.backend import Kind
from tokenyard.errors import ConfigError, did_you_mean
from tokenyard.experts import Experts
from tokenyard.feed_forward import FeedForward
from tokenyard.interfaces import Routing
from tokenyard.registry import Chosen, Registry, Request, default_registry
from tokenyard.workload import Workload

_PARTS: tuple[Kind, ...] = ("router", "permutation", "experts", "exchange")


class MoE(nn.Module):
    """A dropless Mixture-of-Experts layer whose parts are backends, chosen once, here.

    ``y = experts(x) [+ shared(x)] [+ bias]``, where `shared_dim` is the width of a shared expert; with
    `shared_weighted_sum` the sum is K/(K+1) of the experts and 1/(K+1) of the shared one. `output_bias` adds one bias
    [D] to every token (MegaBlocks'). `backends` maps router, permutation, experts and exchange to a name, "auto" or a
    mapping with `name` and options. `group` is the process group of expert parallelism.

    Parameters stand on the workload's device, or on the meta device inside ``with torch.device("meta")``, in `dtype`.
    `chosen` says which backend each part got and why. Raises BackendError for a choice that cannot be made.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        workload: Workload,
        *,
        backends: Mapping[str, Request] | None = None,
        shared_dim: int | None = None,
        shared_weighted_sum: bool = False,
        output_bias: bool = False,
        group: Any = None,
        registry: Registry | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.workload = workload
        self.chosen = _choose_parts(workload, backends or {}, registry or default_registry())
        with _placed(workload.device, dtype):
            self.router = self.chosen["router"].construct(workload)
            permutation = self.chosen["permutation"].construct(workload)
            kernel = self.chosen["experts"].construct(workload, permutation)
            exchange = self.chosen["exchange"].construct(workload, permutation, group)
            self.experts = Experts(workload, permutation, kernel, exchange)
            self.shared = _shared_expert(workload, shared_dim)
            self.register_parameter(
                "bias", nn.Parameter(torch.zeros(workload.dim)) if output_bias else None
            )
        k = workload.top_k
        self._shares = (k / (k + 1), 1 / (k + 1)) if shared_weighted_sum else (1.0, 1.0)

    def forward(self, x: Tensor, topk_ids: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Return y, shaped like x [..., D], and the Routing of its T tokens; topk_ids [T, K] override the selection.

        Raises BackendError for an x of another dtype or device than the workload's.
        """
        self.workload.check_input(x)
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens, topk_ids)
        y = self.experts(tokens, routing)
        if self.shared is not None:
            y = self._shares[0] * y + self._shares[1] * self.shared(tokens)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(x.shape), routing

    def prepare(self, tokens: int) -> None:
        """Compile, in parallel, the kernels that a forward and backward pass over `tokens` tokens launches.

        A backend compiles its own in an optional method ``prepare(tokens)``. One without it compiles, if it has
        anything to compile, when it is first called.
        """
        parts = (self.router, self.experts.permutation, self.experts.kernel)
        methods = [part.prepare for part in parts if hasattr(part, "prepare")]
        with ThreadPoolExecutor(len(parts)) as pool:
            for prepared in [pool.submit(method, tokens) for method in methods]:
                prepared.result()


def moe_layers(model: nn.Module) -> list[MoE]:
    """List the MoE layers of a model in the order in which it was built, which is that of ``Output.balances``."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def _shared_expert(workload: Workload, ffn_dim: int | None) -> FeedForward | None:
    if ffn_dim is None:
        return None
    if ffn_dim < 1:
        raise ConfigError(f"shared_dim is {ffn_dim}; it must be at least 1, or left out")
    return FeedForward(workload.dim, ffn_dim, workload.activation, workload.bias)


def _choose_parts(
    workload: Workload, backends: Mapping[str, Request], registry: Registry
) -> dict[str, Chosen]:
    for part in backends:
        if part not in _PARTS:
            known = ", ".join(_PARTS)
            raise ConfigError(
                f"backends.{part} is not a known key{did_you_mean(part, _PARTS)}; known are: {known}"
            )
    return {part: registry.choose(part, backends.get(part), workload) for part in _PARTS}


@contextmanager
def _placed(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    meta = torch.get_default_device().type == "meta"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device("meta" if meta else device):
            yield
    finally:
        torch.set_default_dtype(before)
