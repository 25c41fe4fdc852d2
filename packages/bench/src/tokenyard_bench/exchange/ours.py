"""The installed exchanges as entrants, each with the options that are measured."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenyard import ConfigError, Permutation, Workload, default_registry
from tokenyard.backend import Backend
from tokenyard.errors import did_you_mean
from tokenyard.experts import Experts
from tokenyard.interfaces import Routing
from tokenyard.registry import BackendChoice, check_options
from tokenyard_bench.exchange.entrant import Candidate, RankEntrant
from tokenyard_bench.exchange.marks import MarkedPermutation, Marks, marked_compute
from tokenyard_bench.exchange.rank_case import RankCase
from tokenyard_bench.exchange.world import World
from tokenyard_bench.requests import parse_request


@dataclass(frozen=True)
class ExchangeRequest:
    """An exchange and its options."""

    text: str
    backend: Backend
    options: Mapping[str, Any]

    def candidate(self, case: RankCase, experts: str, world: World) -> Candidate:
        """Return the layer through this exchange, computed by an expert backend."""
        reason = self.backend.unusable(case.workload)
        in_fp8 = "fp8" in (*self.options.values(), *parse_request("--experts", experts)[1].values())
        return Candidate(
            self.text, "exchange", reason, lambda: self._build(case, experts, world), in_fp8
        )

    def _build(self, case: RankCase, backend: str, world: World) -> RankEntrant:
        choice = BackendChoice("exchange", self.backend, self.options)
        workload = case.workload
        registry = default_registry()
        permutation = registry.choose("permutation", None, workload).construct(workload)
        name, options = parse_request("--experts", backend)
        experts_choice = registry.choose("experts", {"name": name, **options}, workload)
        kernel = experts_choice.construct(workload, permutation)

        def exchange(permutation: Permutation) -> Any:
            return choice.construct(workload, permutation, world.group)

        with torch.device("meta"):
            experts = Experts(workload, permutation, kernel, exchange(permutation))
        experts.up = nn.Parameter(case.up.detach())
        experts.down = nn.Parameter(case.down.detach())
        routing = Routing(case.topk_ids, case.topk_weights, case.topk_weights)

        marking = MarkedPermutation(permutation)
        through = exchange(marking)  # once: an exchange may prepare what its first pass needs

        def marked(marks: Marks) -> Tensor:
            marking.marks = marks
            y: Tensor = through(case.x, routing, marked_compute(experts.compute, marks))
            return y

        leaves = [case.x, case.topk_weights, experts.up, experts.down]
        return RankEntrant(case, lambda: experts(case.x, routing), leaves, marked)


def parse_exchanges(texts: list[str], workload: Workload) -> list[ExchangeRequest]:
    """Return the exchanges of texts such as ``NAME``, ``NAME:KEY=VALUE``, or "all".

    "all" means every exchange between ranks; one that takes `chunks` comes with 1 and with 2.
    Raises ConfigError for an unknown name, or an option without ``=``, and BackendError for an
    option that the exchange does not have.
    """
    offers = default_registry().offers("exchange")
    backends = {offer.backend.name: offer.backend for offer in offers}
    requests: list[ExchangeRequest] = []
    for text in dict.fromkeys(texts):
        if text == "all":
            requests += _all(backends, workload)
            continue
        name, options = parse_request("--exchange", text)
        if name not in backends:
            raise ConfigError(
                f"--exchange {name!r} is unknown{did_you_mean(name, backends)}; "
                f"installed: {', '.join(backends)}, or all"
            )
        check_options(BackendChoice("exchange", backends[name], options), offers)
        requests.append(ExchangeRequest(text, backends[name], options))
    return requests


def check_experts(text: str) -> None:
    """Raise BackendError for experts ``NAME:KEY=VALUE`` of an unknown name or option.

    Whether they are usable depends on a case. The options of "auto" depend on what it selects.
    """
    name, options = parse_request("--experts", text)
    if name != "auto":
        default_registry().choose("experts", {"name": name, **options})


def _all(backends: Mapping[str, Backend], workload: Workload) -> list[ExchangeRequest]:
    """Return every exchange between ranks."""
    requests: list[ExchangeRequest] = []
    for name, backend in backends.items():
        if _on_one_rank_only(backend, workload):
            continue
        requests.append(ExchangeRequest(name, backend, {}))
        usable = backend.unusable(workload) is None  # others may be unable to import
        if usable and "chunks" in inspect.signature(backend.load()).parameters:
            requests.append(ExchangeRequest(f"{name}:chunks=2", backend, {"chunks": 2}))
    if not requests:
        raise ConfigError(
            'no exchange between ranks is installed; pip install "tokenyard[parallel]" provides two'
        )
    return requests


def _on_one_rank_only(backend: Backend, workload: Workload) -> bool:
    alone = replace(workload, expert_parallel=1)
    return backend.unusable(alone) is None and backend.unusable(workload) is not None
