"""The compared implementations of a layer: our backends, and peers."""

from __future__ import annotations

import torch

from tokenyard import BackendError, ConfigError, MoE, default_registry
from tokenyard.moe import allow_weight_copies
from tokenyard.registry import BackendChoice, check_options
from tokenyard_bench.case import Case
from tokenyard_bench.entrant import COARSE, Entrant, SkippedEntrant
from tokenyard_bench.peers import PEERS
from tokenyard_bench.requests import parse_names, parse_peers, parse_request


def backend_entrants(case: Case, names: str) -> list[Entrant | SkippedEntrant]:
    """Return our layer by each expert backend in `names`, which are separated by commas.

    A name may have options, as in ``gluon:precision=fp8``. "all" means every backend except mere
    oracles, without options. Raises ConfigError for one that is not installed, and for "all" with
    options, and BackendError for an option that a backend does not have.
    """
    if names.startswith("all:"):
        raise ConfigError(
            f"--backends is {names!r}, and backends differ in their options; name those that have "
            "them, as in gluon:precision=fp8"
        )
    offers = default_registry().offers("experts")
    backends = {offer.backend.name: offer.backend for offer in offers}
    default = [name for name, backend in backends.items() if backend.priority >= 0]
    entrants: list[Entrant | SkippedEntrant] = []
    requests = default if names == "all" else names.split(",")
    without_options = ",".join(request.partition(":")[0] for request in requests)
    parsed = parse_names("--backends", without_options, default, backends)
    for name, backend in zip(requests, parsed):
        _, options = parse_request("--backends", name)
        check_options(BackendChoice("experts", backends[backend], options), offers)
        reason = backends[backend].unusable(case.workload)
        if reason is None:
            entrants.append(_backend_entrant(case, name))
        else:
            entrants.append(SkippedEntrant(name, "backend", reason))
    return entrants


def peer_entrants(case: Case, names: str) -> list[Entrant | SkippedEntrant]:
    """Return the layer by each peer in `names`: separated by commas, "all" or "none".

    Raises ConfigError for an unknown name.
    """
    return [_peer_entrant(case, name) for name in parse_peers(names, PEERS)]


def build_moe(case: Case, experts: str = "auto") -> MoE:
    """Build our layer around a case's weights, with an expert backend that may have options."""
    name, options = parse_request("--backends", experts)
    with torch.device("meta"):
        moe = MoE(
            case.workload,
            backends={"experts": {"name": name, **options}},
            dtype=case.workload.dtype,
        )
    moe.router.weight = case.router
    moe.experts.up = case.up
    moe.experts.down = case.down
    allow_weight_copies(moe)
    return moe


def _backend_entrant(case: Case, name: str) -> Entrant | SkippedEntrant:
    try:
        moe = build_moe(case, name)
    except BackendError as error:  # an option is refused for this case
        return SkippedEntrant(name, "backend", str(error))
    _, options = parse_request("--backends", name)
    looser = COARSE if "fp8" in options.values() else 1  # of `precision` or `save`
    return Entrant(name, "backend", lambda: moe(case.x, case.topk_ids), looser)


def _peer_entrant(case: Case, name: str) -> Entrant | SkippedEntrant:
    reason = PEERS[name].unusable(case)
    if reason is not None:
        return SkippedEntrant(name, "peer", reason)
    return PEERS[name].build(name, case, build_moe(case).router)
