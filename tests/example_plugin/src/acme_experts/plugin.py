"""What tokenyard finds under the entry point: the offer, without importing the kernel."""

from __future__ import annotations

from tokenyard import Backend, Workload, hookimpl


def unusable(workload: Workload) -> str | None:
    """Accept CPUs only."""
    return (
        None
        if workload.device.type == "cpu"
        else f"'acme' runs on CPUs, not on {workload.device.type}"
    )


@hookimpl
def tokenyard_experts() -> list[Backend]:
    """Offer `acme`, below core's own in priority: it is taken when asked for."""
    return [Backend("acme", "acme_experts.kernel:AcmeExperts", priority=-1, unusable=unusable)]
