"""What `convert` and `upcycle` print about the folder that they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from tokenyard.units import describe_bytes
from tokenyard_cli.console import print_line

_LOAD = {
    "hf": 'transformers.AutoModelForCausalLM.from_pretrained("{0}"), or tokenyard generate {0}',
    "peft": 'peft.AutoPeftModelForCausalLM.from_pretrained("{0}"), or tokenyard generate {0}',
    "tokenyard": "tokenyard generate {0}, or load_path: {0}/ba0 in a config",
}
"""How to load each format; MegaBlocks' has no reader."""


def print_reading(console: Console, source: Path) -> None:
    """Say what is read. It may take minutes."""
    print_line(console, f"reading {source} ...", "dim")


def print_written(console: Console, target: Path, content: str, target_format: str) -> None:
    """Say what is in the folder, its size, and how to load it."""
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print_line(console, f"wrote {target}: {content}, {describe_bytes(size)}")
    if target_format in _LOAD:
        print_line(console, f"load it: {_LOAD[target_format].format(target)}")


def writing_report(console: Console, target: Path) -> Callable[[int, int], None]:
    """Return a function that prints the bytes that are written, of all weights.

    It prints a line before the first shard and between shards.
    """

    def report(written: int, total: int) -> None:
        if written < total:
            done = f", {describe_bytes(written)} are written" if written else ""
            print_line(console, f"writing {target}: {describe_bytes(total)}{done} ...", "dim")

    return report
