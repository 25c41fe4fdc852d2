"""The model families, one module each.

A family's module holds the class (a `Definition`) with its keys, sizes and `size: tiny`. A module
whose models have Hugging Face folders also holds `FORMATS`, a tuple of `HfFormat`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

FAMILIES = {
    "mixtral": "tokenyard_models.families.mixtral:Mixtral",
    "qwen3_moe": "tokenyard_models.families.qwen3_moe:Qwen3Moe",
    "olmoe": "tokenyard_models.families.olmoe:Olmoe",
    "dbrx": "tokenyard_models.families.dbrx:Dbrx",
    "llama": "tokenyard_models.families.llama:Llama",
    "qwen3": "tokenyard_models.families.qwen3:Qwen3",
    "mpt_causal_lm": "tokenyard_models.families.mpt:Mpt",
}
"""Where the class is, by the name that configs use. Nothing is imported before it is needed."""


def load_module(name: str) -> ModuleType:
    """Import the module of a family."""
    return importlib.import_module(FAMILIES[name].partition(":")[0])


def readme_table() -> str:
    """Return the README's table of families, as Markdown."""
    lines = ["| `model.name` | keys | sizes |", "|---|---|---|"]
    for name, path in FAMILIES.items():
        definition = getattr(load_module(name), path.partition(":")[2])
        keys, sizes = definition.readme
        lines.append(f"| `{name}` | {keys} | {sizes} |")
    return "\n".join(lines)
