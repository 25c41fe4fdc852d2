"""The MoE layer: router, experts, shared expert and output bias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenyard.backend import Kind
from tokenyard.errors import ConfigError, did_you_mean
from tokenyard.experts import Experts
from tokenyard.feed_forward import FeedForward
from tokenyard.interfaces import Router, Routing
from tokenyard.registry import BackendChoice, Registry, Request, default_registry
from tokenyard.workload import Workload

_PARTS: tuple[Kind, ...] = ("router", "permutation", "experts", "exchange")


class MoE(nn.Module):
    """A dropless Mixture-of-Experts layer. Its parts are backends, chosen when it is constructed.

    The forward pass has four steps:

    1. Router: choose K experts and their weights for each token.
    2. Exchange: dispatch the tokens to the ranks that hold their experts; compute the experts
       there (plan, then expert kernel); combine the weighted outputs of each token.
    3. Shared expert (optional): compute a dense FFN for every token.
    4. Sum: add the experts, the shared expert and the output bias (optional).

    Arguments:

    - `backends`: maps router, permutation, experts and exchange to a backend's name, to "auto", or
      to a mapping with `name` and options.
    - `shared_dim`: width of the shared expert; None for no shared expert.
    - `shared_weighted_sum`: weight the experts by K/(K+1) and the shared expert by 1/(K+1).
    - `output_bias`: add a bias [D] to every token, as MegaBlocks does.
    - `group`: the process group of expert parallelism. `auto` expects neighbouring ranks in it; for
      others, name an exchange that connects any ranks, such as `all_to_all_tokens`.
    - `dtype`: the dtype of the parameters. Their device is the workload's device, or the meta
      device inside ``with torch.device("meta")``.

    The attribute `chosen` maps each part to its `BackendChoice`. Raises BackendError if a backend
    cannot be used.
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
        with _parameter_defaults(workload.device, dtype):
            _check_rule_options(self.chosen["router"], workload)
            self.router: Router = self.chosen["router"].construct(workload)
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

    def forward(
        self, x: Tensor, topk_ids: Tensor | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Return y, shaped like x [..., D], and the Routing of its T tokens.

        `topk_ids` [T, K] override the router's selection. Where `padding` [...] is true, no expert
        computes the token. Give it to ``router.balance``, too. Raises BackendError if x has another
        dtype or device than the workload.
        """
        self.workload.check_input(x)
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]

        # 1. router: topk_ids [T, K], topk_weights [T, K], logits [T, E]
        if padding is None:
            routing = self.router(tokens, topk_ids)
        else:
            routing = self.router(tokens, topk_ids, padding.reshape(-1))

        # 2. exchange: dispatch, compute, combine -> [T, D]
        y = self.experts(tokens, routing)

        # 3. and 4. shared expert [T, D] and bias [D], added to y
        if self.shared is not None:
            y = self._shares[0] * y + self._shares[1] * self.shared(tokens)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(x.shape), routing  # [..., D]

    def prepare(self, tokens: int, sums: bool = False) -> None:
        """Compile in parallel all kernels for a forward and backward pass over `tokens` tokens.

        With `sums`, passes that add gradients to ``experts.gradient_sums`` are compiled, too.

        A backend compiles its kernels in the optional method ``prepare(tokens)``. An expert kernel
        has two more: ``prepare_with_adapter(tokens, adapter)``, and ``prepare_with_sums(tokens)``
        for passes with and without sums. A backend without the method compiles in its first call.
        """
        parts: tuple[Any, ...] = (self.router, self.experts.permutation)
        methods = [part.prepare for part in parts if hasattr(part, "prepare")]
        methods.append(partial(self.experts.prepare, sums=sums))
        with ThreadPoolExecutor(len(methods)) as pool:
            for prepared in [pool.submit(method, tokens) for method in methods]:
                prepared.result()


def moe_layers(model: nn.Module) -> list[MoE]:
    """Return the MoE layers of a model in construction order, the order of ``Output.balances``."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def allow_weight_copies(model: nn.Module) -> None:
    """Let expert kernels keep copies of weights: the model's parameters change in place only.

    See ``interfaces.CachingExpertKernel``. FSDP gathers weights, so it must not be used then.
    Changes through ``parameter.data`` and by a replayed CUDA graph have no version: without a step
    of an optimizer after them, kernels would not see them.
    """
    for moe in moe_layers(model):
        if hasattr(moe.experts.kernel, "weights_have_versions"):
            moe.experts.kernel.weights_have_versions = True


def _shared_expert(workload: Workload, ffn_dim: int | None) -> FeedForward | None:
    if ffn_dim is None:
        return None
    if ffn_dim < 1:
        raise ConfigError(f"shared_dim is {ffn_dim}; it must be at least 1, or left out")
    return FeedForward(workload.dim, ffn_dim, workload.activation, workload.bias)


def _check_rule_options(choice: BackendChoice, workload: Workload) -> None:
    """Raise ConfigError for an option of the routing rule that the router does not name."""
    known = getattr(choice.backend.load(), "rule_options", ())
    for name in workload.router.options:
        if name not in known:
            names = ", ".join(known) or "none; a router names them in rule_options"
            raise ConfigError(
                f"{name!r} is not an option of the routing algorithm "
                f"{workload.router.algorithm!r}{did_you_mean(name, known)}; known are: {names}"
            )


def _choose_parts(
    workload: Workload, backends: Mapping[str, Request], registry: Registry
) -> dict[str, BackendChoice]:
    for part in backends:
        if part not in _PARTS:
            known = ", ".join(_PARTS)
            raise ConfigError(
                f"backends.{part} is not a known key{did_you_mean(part, _PARTS)}; "
                f"known are: {known}"
            )
    return {part: registry.choose(part, backends.get(part), workload) for part in _PARTS}


@contextmanager
def _parameter_defaults(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Context: make new tensors by default in `dtype` on `device`, or on the meta device if set."""
    meta = torch.get_default_device().type == "meta"
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default_dtype)
    try:
        with torch.device("meta" if meta else device):
            yield
    finally:
        torch.set_default_dtype(default_dtype)
