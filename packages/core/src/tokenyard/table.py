"""The table of installed backends, with a reason for each unusable one."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tokenyard.backend import KINDS
from tokenyard.devices import resolve_device
from tokenyard.foreign import attempt
from tokenyard.registry import Registry
from tokenyard.registry._choose import why_not
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
    algorithm = offer.backend.algorithm
    usable = "usable"
    if algorithm not in (None, workload.router.algorithm):
        workload = replace(workload, router=replace(workload.router, algorithm=algorithm))
        usable = f"usable, for the routing algorithm {algorithm!r}"
    missing, fault = attempt(lambda: _missing_class(offer))
    return why_not(offer, workload) or missing or fault or usable


def _missing_class(offer: Offer) -> str | None:
    """Return a sentence if the class of a backend does not exist.

    A module that is not imported yet is judged by its source: importing all of them takes seconds.
    """
    module, _, name = offer.backend.path.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return f"its module {module!r} does not exist"
    if module in sys.modules:
        names = set(vars(sys.modules[module]))
    elif spec.origin is not None and spec.origin.endswith(".py"):
        names = _defined_names(ast.parse(Path(spec.origin).read_bytes()))
    else:
        return None
    if name in names or "__getattr__" in names:
        return None
    return f"its module {module!r} has no {name!r}"


def _defined_names(module: ast.Module) -> set[str]:
    """Return the names that a module defines or imports at its top level."""
    names: set[str] = set()
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


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
