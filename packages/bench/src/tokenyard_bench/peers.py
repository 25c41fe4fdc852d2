"""Implementations of other libraries: torch's grouped matmul, transformers and SonicMoE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard import Routing
from tokenyard_bench.case import Case
from tokenyard_bench.entrant import COARSE, Entrant
from tokenyard_bench.sonicmoe import no_sonicmoe, sonicmoe_entrant

Experts = Callable[[Tensor, Routing], Tensor]


@dataclass(frozen=True)
class Peer:
    """An implementation: why it is unusable for a case, if it is, and how to build it.

    `build` takes the name of the entrant, the case and our router.
    """

    unusable: Callable[[Case], str | None]
    build: Callable[[str, Case, Any], Entrant]


def _swiglu_only(case: Case) -> str | None:
    if case.workload.activation == "swiglu":
        return None
    return f"computes swiglu, not {case.workload.activation}"


def _needs_transformers(case: Case) -> str | None:
    if find_spec("transformers") is None:
        return 'transformers is not installed; pip install "transformers>=5.14"'
    return _swiglu_only(case)


def _compilable(case: Case) -> str | None:
    workload = case.workload
    if workload.dtype != torch.bfloat16:
        return "torch compiles F.grouped_mm for bf16 only"
    from torch._inductor.exc import InvalidCxxCompiler

    if workload.device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "torch.compile needs a C++ compiler on a CPU, and finds none"
    return _swiglu_only(case)


def _behind_our_router(build: Callable[[Case], Experts]) -> Callable[[str, Case, Any], Entrant]:
    def entrant(name: str, case: Case, router: Any) -> Entrant:
        experts = build(case)

        def layer() -> tuple[Tensor, Routing]:
            routing = router(case.x, case.topk_ids)
            return experts(case.x, routing), routing

        return Entrant(name, "peer", layer, COARSE)

    return entrant


def grouped_mm_experts(x: Tensor, routing: Routing, up: Tensor, down: Tensor) -> Tensor:
    """Return y [T, D] by ``F.grouped_mm`` between a gather and a sum, the common code."""
    ids, order = routing.topk_ids.flatten().sort(stable=True)
    experts = torch.arange(up.shape[0], device=x.device)
    ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
    tokens = order // routing.topk_ids.shape[1]
    gate, value = F.grouped_mm(x[tokens], up.mT, offs=ends).chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * value, down.mT, offs=ends)
    rows = rows * routing.topk_weights.to(x.dtype).flatten()[order].unsqueeze(1)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=x.device)
    return rows[places].unflatten(0, routing.topk_ids.shape).sum(1)


def _grouped_mm(case: Case) -> Experts:
    return lambda x, routing: grouped_mm_experts(x, routing, case.up, case.down)


def _compiled(case: Case) -> Experts:
    # Without a reset, torch reaches its recompile limit after some shapes and runs eagerly.
    torch.compiler.reset()
    compiled = torch.compile(grouped_mm_experts)
    return lambda x, routing: compiled(x, routing, case.up, case.down)


def _transformers(implementation: str) -> Callable[[Case], Experts]:
    def build(case: Case) -> Experts:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        workload = case.workload
        config = MixtralConfig(
            hidden_size=workload.dim,
            intermediate_size=workload.ffn_dim,
            num_local_experts=workload.num_experts,
            num_experts_per_tok=workload.top_k,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = MixtralExperts(config)
        experts.gate_up_proj = case.up
        experts.down_proj = case.down

        def layer(x: Tensor, routing: Routing) -> Tensor:
            # Weights in the model's dtype, as the routers of Qwen3-MoE and OLMoE return them.
            # Those of Mixtral are float32, which is slower.
            return experts(x, routing.topk_ids.long(), routing.topk_weights.to(x.dtype))

        return layer

    return build


_EAGER = _behind_our_router(_transformers("eager"))
_GROUPED = _behind_our_router(_transformers("grouped_mm"))

PEERS: dict[str, Peer] = {
    "grouped_mm": Peer(_swiglu_only, _behind_our_router(_grouped_mm)),
    "grouped_mm-compiled": Peer(_compilable, _behind_our_router(_compiled)),
    "transformers-eager": Peer(_needs_transformers, _EAGER),
    "transformers-grouped_mm": Peer(_needs_transformers, _GROUPED),
    "sonicmoe": Peer(no_sonicmoe, sonicmoe_entrant),
}
"""Every peer, by its name for `--peers`."""
