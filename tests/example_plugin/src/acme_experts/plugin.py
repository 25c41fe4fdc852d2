"""The offers of the plugin, without importing what they name."""

from __future__ import annotations

from tokenyard import Backend, Workload, hookimpl


def only_cpu(workload: Workload) -> str | None:
    """Accept CPUs only."""
    kind = workload.device.type
    return None if kind == "cpu" else f"'acme' runs on CPUs, not on {kind}"


@hookimpl
def tokenyard_experts() -> list[Backend]:
    """Offer `acme`, below core's kernels in priority: `auto` never takes it."""
    return [Backend("acme", "acme_experts.kernel:AcmeExperts", priority=-1, unusable=only_cpu)]


@hookimpl
def tokenyard_routers() -> list[Backend]:
    """Offer `acme_choice`, the only router of its algorithm: `auto` takes it."""
    router = "acme_experts.router:ExpertChoiceRouter"
    return [Backend("acme_choice", router, algorithm="acme_choice")]


@hookimpl
def tokenyard_models() -> list[Backend]:
    """Offer `acme`, for ``model.name``."""
    return [Backend("acme", "acme_experts.model:AcmeModel")]
