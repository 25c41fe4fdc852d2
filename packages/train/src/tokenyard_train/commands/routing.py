"""How a trained model routes a text."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokenyard import ConfigError, moe_layers
from tokenyard_train.commands.load_model import load_trained
from tokenyard_train.commands.routing_counts import LayerReport, route
from tokenyard_train.data import Tokenizer, build_tokenizer
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.sources.files import find_files, read_file
from tokenyard_train.records.results import write_results


def report(
    path: Path,
    data: Path,
    tokens: int,
    text_key: str,
    tokenizer: str | None,
    out: Path,
    console: Console,
    device: str = "auto",
    precision: str | None = None,
) -> list[LayerReport]:
    """Route a text by the model at `path`; print a table, and write ``routing.json`` and ``routing.png`` to `out`.

    `data` is a file of text, or a folder of .txt files; `device` and `precision` are those of `load_trained`. Raises
    TokenyardError.
    """
    found = load_trained(path, device, precision)
    if not moe_layers(found.model):
        raise ConfigError(f"the model in {path} has no experts; give one that has")
    reads = build_tokenizer(
        found.tokenizer if tokenizer is None else TokenizerConfig(name=tokenizer)
    )
    ids = _ids(data, text_key, reads, tokens)
    with found.computing():
        layers = route(found.model, ids)
    records = [layer._asdict() for layer in layers]
    content = {
        "kind": "routing",
        "model": str(path),
        "data": str(data),
        "tokens": len(ids),
        "records": records,
    }
    written = write_results(out, "routing", content)
    from tokenyard_train.commands.routing_plot import (
        routing_plot,
    )  # a second that a mistake need not wait for

    routing_plot(layers, written.with_suffix(".png"))
    _print(layers, len(ids), console)
    console.print(
        f"wrote {written} and {written.with_suffix('.png')}", highlight=False, markup=False
    )
    return layers


def _ids(data: Path, text_key: str, tokenizer: Tokenizer, most: int) -> Tensor:
    ids: list[int] = []
    for file in find_files(str(data), (".txt",), "--data"):
        for document in read_file(file, text_key, "--data"):
            ids += [*tokenizer.encode(document).tolist(), tokenizer.end]
            if len(ids) >= most:
                return torch.tensor(ids[:most])
    if not ids:
        raise ConfigError(
            f"--data {str(data)!r} holds no text; give a file of text, or a folder of .txt files"
        )
    return torch.tensor(ids)


def _print(layers: list[LayerReport], tokens: int, console: Console) -> None:
    table = Table(
        "layer",
        "entropy",
        "busiest",
        "dead",
        "the pair that goes together most",
        title_justify="left",
    )
    table.title = f"{tokens:,} tokens"
    for number, layer in enumerate(layers):
        share, one, other = max(
            (s, i, j) for i, row in enumerate(layer.together) for j, s in enumerate(row)
        )
        dead = ", ".join(map(str, layer.dead[:8])) + (", ..." if len(layer.dead) > 8 else "")
        pair = f"{100 * share:.0f} % of expert {one}'s tokens go to {other}, too" if share else ""
        table.add_row(
            str(number), f"{layer.entropy:.3f}", f"{layer.busiest:.2f}", dead or "none", pair
        )
    console.print(table)
