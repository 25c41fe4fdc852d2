"""Report how a trained model routes a text: measure, print, and write files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokenyard import ConfigError, TokenyardError, moe_layers
from tokenyard.paths import whole_file
from tokenyard_cli.console import print_line
from tokenyard_cli.results import write_results
from tokenyard_train.commands.load_model import load_trained
from tokenyard_train.commands.options import RoutingOptions
from tokenyard_train.commands.routing_counts import LayerReport, route
from tokenyard_train.data import Tokenizer
from tokenyard_train.data.sources.files import find_files
from tokenyard_train.data.sources.formats import read_file
from tokenyard_train.data.text_loss import LossCounter
from tokenyard_train.engine.sampling import check_vocabulary


def report(options: RoutingOptions, console: Console) -> list[LayerReport]:
    """Route a text with a model; print a table, and write routing.json and routing.png.

    Raises TokenyardError.
    """
    layers, tokens = measure(options)
    paths = write_files(options, layers, tokens)
    _print_table(layers, tokens, console)
    print_line(console, f"wrote {' and '.join(map(str, paths))}")
    return layers


def measure(options: RoutingOptions) -> tuple[list[LayerReport], int]:
    """Route a text with a model; return a report for each MoE layer, and the number of tokens.

    Raises ConfigError if the model has no experts, or the text is empty.
    """
    loaded = load_trained(options.model, options.device, options.precision, options.base)
    if not moe_layers(loaded.model):
        raise ConfigError(f"the model in {options.model} has no experts; give one that has")
    tokenizer = loaded.with_tokenizer(options.tokenizer).build_tokenizer()
    ids = _read_ids(options.data, options.text_key, tokenizer, options.tokens)
    check_vocabulary(loaded.model, ids.tolist(), f"--data {str(options.data)!r}")
    with loaded.autocast():
        return route(loaded.model, ids), len(ids)


def write_files(
    options: RoutingOptions, layers: Sequence[LayerReport], tokens: int
) -> tuple[Path, Path]:
    """Write routing.json and routing.png to the output folder; return their paths."""
    content = {
        "kind": "routing",
        "model": str(options.model),
        "data": str(options.data),
        "tokens": tokens,
        "records": [layer._asdict() for layer in layers],
    }
    results = write_results(options.out, "routing", content)
    picture = results.with_suffix(".png")
    # Importing matplotlib takes a second, which a mistake in the options need not wait for.
    from tokenyard_train.commands.routing_plot import routing_plot

    try:
        with whole_file(picture) as unfinished:
            routing_plot(layers, unfinished)
    except OSError as error:
        raise TokenyardError(f"{picture} cannot be written: {error.strerror}") from None
    return results, picture


def _read_ids(data: Path, text_key: str, tokenizer: Tokenizer, limit: int) -> Tensor:
    """Read and tokenize at most `limit` tokens of text; each document ends with the end id."""
    ids: list[int] = []
    counter = LossCounter(tokenizer)
    for file in find_files(str(data), (".txt",), "--data"):
        for document in filter(None, read_file(file, text_key, "--data")):
            ids += [*counter.encode(document).tolist(), tokenizer.end]
            if len(ids) >= limit:
                break
        if len(ids) >= limit:
            break
    if not ids:
        raise ConfigError(
            f"--data {str(data)!r} holds no text; give a file of text, or a folder of .txt files"
        )
    counter.loss.warn("--data")
    return torch.tensor(ids[:limit])


def _print_table(layers: Sequence[LayerReport], tokens: int, console: Console) -> None:
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
        table.add_row(
            str(number),
            f"{layer.entropy:.3f}",
            f"{layer.busiest:.2f}",
            _describe_dead(layer),
            _describe_pair(layer),
        )
    console.print(table)


def _describe_dead(layer: LayerReport) -> str:
    if not layer.dead:
        return "none"
    return ", ".join(map(str, layer.dead[:8])) + (", ..." if len(layer.dead) > 8 else "")


def _describe_pair(layer: LayerReport) -> str:
    """Name the two experts that share most tokens."""
    share, one, other = max(
        (share, i, j) for i, row in enumerate(layer.together) for j, share in enumerate(row)
    )
    return f"{100 * share:.0f} % of expert {one}'s tokens go to {other}, too" if share else ""
