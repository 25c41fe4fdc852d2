"""Titles of the measured cases."""

from __future__ import annotations

from tokenyard_cli.results import Record


def case_key(record: Record) -> tuple[str, str, str]:
    """Return what identifies a case: shape, dtype and routing."""
    return record["shape"]["name"], record["dtype"], record["routing"]


def case_title(record: Record) -> str:
    """Return a case in words: name, size, dtype and routing."""
    shape = record["shape"]
    size = (
        f"T {shape['tokens']}, D {shape['dim']}, F {shape['ffn_dim']}, "
        f"E {shape['num_experts']}, K {shape['top_k']}"
    )
    name = f"{shape['name']}: " if "," not in shape["name"] else ""
    return f"{name}{size}; {record['dtype']}, {record['routing']} routing"
