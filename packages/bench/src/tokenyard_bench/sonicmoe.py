"""SonicMoE's layer as a peer: with its own router, as it is fastest.

Guo et al. 2025, arXiv 2512.14080, https://github.com/Dao-AILab/sonic-moe.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tokenyard import Routing
from tokenyard_bench.case import Case
from tokenyard_bench.entrant import COARSE, Entrant, Results


def no_sonicmoe(case: Case) -> str | None:
    """Return why SonicMoE cannot run a case, or None if it can."""
    workload = case.workload
    if find_spec("sonicmoe") is None:
        return "sonicmoe is not installed; see https://github.com/Dao-AILab/sonic-moe"
    if workload.capability is None or workload.capability[0] != 9:
        return "SonicMoE is for Hopper GPUs"
    if workload.dtype not in (torch.bfloat16, torch.float16):
        return "SonicMoE computes in bf16 and fp16"
    if workload.activation != "swiglu":
        return f"computes swiglu, not {workload.activation}"
    if case.topk_ids is not None:
        return "SonicMoE selects experts itself, and --routing uniform sets them"
    return None


@dataclass(frozen=True, kw_only=True)
class SonicMoE(Entrant):
    """SonicMoE's layer. Its up projection is a copy in which rows of gate and up alternate."""

    case: Case
    up: Tensor  # [E, 2F, D], a leaf

    def forward(self) -> Tensor:
        """Return the output [T, D]."""
        return _sonicmoe(self.case, self.up)[0]

    def leaves(self, case: Case) -> list[Tensor]:
        """Return x, router, the copy of up, and down."""
        return [case.x, case.router, self.up, case.down]

    def results(self, case: Case) -> Results:
        """Run both passes. Return the gradient of up in the order of the case's weight."""
        results = super().results(case)
        return results._replace(dup=results.dup.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2))


def sonicmoe_entrant(name: str, case: Case, router: Any) -> Entrant:
    """Return SonicMoE's layer with the weights of a case. Our router is not used."""
    interleaved = case.up.detach().unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    up = interleaved.contiguous().requires_grad_()
    return SonicMoE(name, "peer", lambda: _with_routing(case, up), COARSE, case=case, up=up)


def _sonicmoe(case: Case, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output [T, D] and the router's logits [T, E]."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_TC_softmax_topk_layer

    y, logits, _ = moe_TC_softmax_topk_layer(
        case.x,
        case.router,
        up.permute(1, 2, 0),
        None,
        case.down.permute(1, 2, 0),
        None,
        case.workload.top_k,
        torch.cuda.current_stream(case.x.device).cuda_stream,
        ActivationType.SWIGLU,
        False,
    )
    return y, logits


def _with_routing(case: Case, up: Tensor) -> tuple[Tensor, Routing]:
    """Return the output and the routing, by selecting a second time as the layer does."""
    from sonicmoe.functional import TC_Softmax_Topk_Router_Function

    y, logits = _sonicmoe(case, up)
    work = case.workload
    weights, ids = TC_Softmax_Topk_Router_Function.apply(logits, work.num_experts, work.top_k)
    return y, Routing(ids, weights, logits)
