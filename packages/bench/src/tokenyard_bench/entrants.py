"""What is measured: a layer computed by a backend of ours, or by somebody else's experts behind the same router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokenyard import ConfigError, MoE, Routing, default_registry
from tokenyard.errors import did_you_mean
from tokenyard.measure.timing import Stages
from tokenyard_bench.case import Case
from tokenyard_bench.peers import PEERS

Layer = Callable[[], tuple[Tensor, Routing]]


@dataclass(frozen=True)
class Contestant:
    """One way to compute the layer of a case: call `layer` for its output [T, D] and routing."""

    name: str
    group: Literal["backend", "peer"]
    layer: Layer

    def stages(self, case: Case) -> Stages:
        """Return the forward and the backward pass, for the clock."""
        return (lambda _: self.layer()[0], lambda y: torch.autograd.grad(y, case.leaves(), case.dy))


@dataclass(frozen=True)
class Absent:
    """A contestant that cannot take part, and why, in one sentence."""

    name: str
    group: Literal["backend", "peer"]
    reason: str


def backends(case: Case, asked: str) -> list[Contestant | Absent]:
    """Return our layer by each expert backend asked for, comma-separated; "all": every one but the mere oracles.

    Raises ConfigError for a name that is not installed.
    """
    offers = {offer.backend.name: offer.backend for offer in default_registry().offers("experts")}
    names = (
        [n for n, b in offers.items() if b.priority >= 0] if asked == "all" else asked.split(",")
    )
    for name in names:
        if name not in offers:
            known = ", ".join(offers)
            raise ConfigError(
                f"--backends {name!r} is unknown{did_you_mean(name, offers)}; installed: {known}, or all"
            )
    reasons = {name: offers[name].unusable(case.workload) for name in names}
    return [
        _ours(case, n) if reasons[n] is None else Absent(n, "backend", str(reasons[n]))
        for n in names
    ]


def peers(case: Case, asked: str) -> list[Contestant | Absent]:
    """Return the layer by each peer asked for, comma-separated, "all" or "none"; the router is ours.

    Raises ConfigError for an unknown name.
    """
    names = {"all": list(PEERS), "none": []}.get(asked, asked.split(","))
    for name in names:
        if name not in PEERS:
            known = ", ".join(PEERS)
            raise ConfigError(
                f"--peers {name!r} is unknown{did_you_mean(name, PEERS)}; known are: {known}, all, none"
            )
    router = build_moe(case).router
    return [_peer(case, name, router) for name in names]


def build_moe(case: Case, experts: str = "auto") -> MoE:
    """Build our layer around the weights of a case."""
    with torch.device("meta"):
        moe = MoE(case.workload, backends={"experts": experts}, dtype=case.workload.dtype)
    moe.router.weight, moe.experts.up, moe.experts.down = case.router, case.up, case.down
    return moe


def _ours(case: Case, name: str) -> Contestant:
    moe = build_moe(case, name)
    return Contestant(name, "backend", lambda: moe(case.x, case.topk_ids))


def _peer(case: Case, name: str, router: Any) -> Contestant | Absent:
    reason = PEERS[name].unusable(case.workload)
    if reason is not None:
        return Absent(name, "peer", reason)
    experts = PEERS[name].build(case)

    def layer() -> tuple[Tensor, Routing]:
        routing = router(case.x, case.topk_ids)
        return experts(case.x, routing), routing

    return Contestant(name, "peer", layer)
