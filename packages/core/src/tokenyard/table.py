"""The table of installed backends, with a reason for each unusable one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenyard.backend import KINDS
from tokenyard.devices import resolve_device
from tokenyard.registry import Registry
from tokenyard.registry._choose import load_fault, why_not
from tokenyard.registry._offers import Offer
from tokenyard.workload import Workload


@dataclass(frozen=True)
class Row:
    """One line of the table: a backend, its distribution, and whether it is usable."""

    kind: str
    name: str
    distribution: str
    status: str  # "usable", or the backend's reason


def sample_workload() -> Workload:
    """Return a typical layer for which the table checks backends.

    It is in bfloat16 on a GPU if torch finds one, else in float32 on the CPU.
    """
    device = resolve_device("auto")
    return Workload(
        dim=1024,
        ffn_dim=1024,
        num_experts=16,
        top_k=4,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        device=device,
    )


def rows(registry: Registry, workload: Workload) -> list[Row]:
    """Return one row for each backend, sorted by kind, then by priority."""
    return [
        Row(kind, o.backend.name, f"{o.distribution} {o.version}", _status(o, workload))
        for kind in KINDS
        for o in registry.offers(kind)
    ]


def _status(offer: Offer, workload: Workload) -> str:
    return why_not(offer, workload) or load_fault(offer) or "usable"


def render(registry: Registry, workload: Workload) -> str:
    """Return the table as text, followed by the plugins that could not be loaded."""
    header = Row("kind", "name", "distribution", "usable here?")
    lines = _columns([header, *rows(registry, workload)])
    lines += [f"left out: {problem.reason}" for problem in registry.problems]
    shape = (
        f"{workload.num_experts} experts, top-{workload.top_k}, {workload.dim} x {workload.ffn_dim}"
    )
    target = f"{workload.device.type}, {str(workload.dtype).removeprefix('torch.')}"
    return "\n".join([*lines, f"checked for a layer of {shape} ({target})"])


def _columns(table: Sequence[Row]) -> list[str]:
    cells = [(r.kind, r.name, r.distribution, r.status) for r in table]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[3]]) for row in cells]
