"""The table of installed backends, with the reason where one is unusable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenyard.backend import KINDS
from tokenyard.devices import resolve_device
from tokenyard.registry import Registry
from tokenyard.registry._choose import why_not
from tokenyard.workload import Workload


@dataclass(frozen=True)
class Row:
    """One line of the table: a backend, who brought it, and whether it can be used."""

    kind: str
    name: str
    distribution: str
    status: str  # "usable", or the backend's own sentence


def sample_workload() -> Workload:
    """Return an ordinary layer on this machine's device, by which the table judges: bfloat16 on a GPU, else float32."""
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
    """List every backend, by kind and then by priority."""
    return [
        Row(kind, o.backend.name, f"{o.distribution} {o.version}", why_not(o, workload) or "usable")
        for kind in KINDS
        for o in registry.offers(kind)
    ]


def render(registry: Registry, workload: Workload) -> str:
    """Return the table as text, followed by the plugins that were left out."""
    header = Row("kind", "name", "distribution", "usable here?")
    lines = _columns([header, *rows(registry, workload)])
    lines += [f"left out: {problem.reason}" for problem in registry.problems]
    where = f"{workload.device.type}, {str(workload.dtype).removeprefix('torch.')}"
    shape = (
        f"{workload.num_experts} experts, top-{workload.top_k}, {workload.dim} x {workload.ffn_dim}"
    )
    return "\n".join([*lines, f"judged by a layer of {shape} ({where})"])


def _columns(table: Sequence[Row]) -> list[str]:
    cells = [(r.kind, r.name, r.distribution, r.status) for r in table]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[3]]) for row in cells]
